"""What goes with a row, and what a page says that lists it before."""

from __future__ import annotations

from typing import Any

from django.db.models import CASCADE, Model, QuerySet


def cascade(collector: Any, field: Any, sub_objs: Any, using: str) -> None:
    """Delete along, as CASCADE does; a page of the admin is told only how many.

    One conversation has tens of thousands of rows, and the admin would load and print
    each where a user is to be deleted.
    """
    from django.contrib.admin.utils import NestedObjects

    if isinstance(collector, NestedObjects) and not _is_known_outside(field.model):
        _count(collector, sub_objs, using)
    else:
        CASCADE(collector, field, sub_objs, using)


# What is only counted isn't loaded.
cascade.lazy_sub_objs = True  # type: ignore[attr-defined]


class _Counted(set[Any]):
    """What the page takes for the objects of a model: only how many there are."""

    more = 0

    def __len__(self) -> int:
        return super().__len__() + self.more


def _count(collector: Any, rows: QuerySet[Any], using: str) -> None:
    """Count rows, and those that go with them."""
    found = collector.model_objs.setdefault(rows.model, _Counted())
    found.more += rows.count()
    for model, name in _followers(rows.model):
        own = {f"{name}__in": rows.values("pk")}
        _count(collector, model._base_manager.using(using).filter(**own), using)


def _followers(model: type[Model]) -> list[tuple[type[Model], str]]:
    """Return the models whose rows go with this one's, each with its field."""
    return [
        (relation.related_model, relation.field.name)
        for relation in _relations(model)
        if relation.on_delete in {CASCADE, cascade}
        and relation.related_model is not model
    ]


def _is_known_outside(model: type[Model]) -> bool:
    """Return whether a project's own models refer to what would only be counted.

    Theirs have a word in it: they may be protected, or want rights of their own.
    """
    label = model._meta.app_label
    return any(
        relation.related_model._meta.app_label != label
        for relation in _relations(model)
    ) or any(_is_known_outside(other) for other, _ in _followers(model))


def _relations(model: type[Model]) -> list[Any]:
    fields: Any = model._meta.get_fields(include_hidden=True)
    return [
        field
        for field in fields
        if field.auto_created
        and not field.concrete
        and (field.one_to_one or field.one_to_many)
    ]
