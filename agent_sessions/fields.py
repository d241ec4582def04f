"""Model fields that behave the same on every database, and what goes with a row."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import models
from django.db.models import (
    CASCADE,
    CharField,
    Count,
    Exists,
    F,
    Model,
    OuterRef,
    QuerySet,
    Subquery,
    Sum,
    Value,
)
from django.db.models.functions import Cast, Concat
from django.utils import timezone

# The name of UTF-8 on MariaDB and MySQL.
CHARSET = "utf8mb4"
# Rows of one query.
_CHUNK = 100
# Rows that a page of the admin names; more are counted.
_NAMED = 20

if TYPE_CHECKING:
    _CharField = models.CharField[str, str]
    _TextField = models.TextField[str, str]
else:
    # Generic for type checkers alone.
    _CharField = models.CharField
    _TextField = models.TextField


def _of_every_character(db_type: str | None, connection: Any) -> str | None:
    """Return the type of a column that takes every character on MariaDB and MySQL."""
    if connection.vendor == "mysql" and db_type:
        return f"{db_type} CHARACTER SET {CHARSET}"
    return db_type


class WideCharField(_CharField):
    """A CharField that holds every character, whatever the database's charset is."""

    def db_type(self, connection: Any) -> str | None:
        """Return the column's type, with a character set that holds every character."""
        return _of_every_character(super().db_type(connection), connection)


class WideTextField(_TextField):
    """A TextField that holds every character, whatever the database's charset is."""

    def db_type(self, connection: Any) -> str | None:
        """Return the column's type, with a character set that holds every character."""
        return _of_every_character(super().db_type(connection), connection)


class ExactCharField(WideCharField):
    """A CharField that tells "a" from "A", "é" and "a ", on MariaDB and MySQL too.

    Its texts are in the order of their characters' numbers, so that an index serves a
    search for their beginning.
    """

    def db_parameters(self, connection: Any) -> Any:
        """Return the parameters of the column, with a collation that compares exactly."""
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            # The collations that neither fold case nor pad with spaces.
            parameters["collation"] = (
                "utf8mb4_nopad_bin"
                if connection.mysql_is_mariadb
                else "utf8mb4_0900_bin"
            )
        elif connection.vendor == "postgresql":
            parameters["collation"] = "C"
        return parameters


class RawTextField(_TextField):
    """A TextField that returns invalid UTF-8 too, as raw lone surrogates.

    SQLite keeps any bytes in a text column, and its driver then fails for all rows of
    a query, with an error that quotes them.
    """

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        """Read bytes on SQLite."""
        if compiler.connection.vendor == "sqlite":
            sql = f"CAST({sql} AS BLOB)"
        return sql, params

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        """Decode what was read as bytes."""
        if isinstance(value, bytes):
            return value.decode(errors="surrogateescape")
        return value

    def deconstruct(self) -> Any:
        """Describe the field as a plain TextField, which its column is."""
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.TextField", args, kwargs


def cascade(collector: Any, field: Any, sub_objs: Any, using: str) -> None:
    """Delete rows as CASCADE does, but only count them for a page of the admin.

    The admin lists what goes with a user who is to be deleted. One conversation has
    tens of thousands of rows, and the admin would load and print each.
    """
    from django.contrib.admin.utils import NestedObjects

    if isinstance(collector, NestedObjects) and not _is_known_outside(field.model):
        _count(collector, sub_objs, using)
    else:
        CASCADE(collector, field, sub_objs, using)


# Rows that are only counted aren't loaded.
cascade.lazy_sub_objs = True  # type: ignore[attr-defined]


def detach(collector: Any, field: Any, sub_objs: Any, using: str) -> None:
    """Take the sessions of a deleted user out of sight; see retention.removal.

    Their rows are deleted some at a time, once the user's deletion is committed: in its
    transaction, all who write would wait. A page of the admin names the newest of them
    and counts the rest. Those whose items lie elsewhere, and all that a project's own
    models refer to, are deleted with the user.
    """
    from django.contrib.admin.utils import NestedObjects

    model = field.model
    is_page = isinstance(collector, NestedObjects)
    if _is_known_outside(model) or (is_page and _asks_rows(model)):
        CASCADE(collector, field, sub_objs, using)
        return
    if is_page:
        # The page asks the right to delete them of those that it names.
        for row in sub_objs.order_by("-active_on", "-pk")[:_NAMED]:
            collector.add_edge(getattr(row, field.name), row)
        _count(collector, sub_objs, using)
        return
    branches = model._meta.get_field("branches").related_model._base_manager
    filled = branches.filter(session_id=OuterRef("pk"), head__gt=0)
    # Whole rows: who listens to a deletion may look at any column.
    found = list(sub_objs.annotate(own=Exists(filled)))
    # An alias may have kept them in the database before.
    app: Any = apps.get_app_config(model._meta.app_label)
    away = {
        alias for alias in {row.backend for row in found} if app.keeps_outside(alias)
    }
    if outside := [row for row in found if not row.own or row.backend in away]:
        CASCADE(collector, field, outside, using)  # type: ignore[arg-type]
    if not (own := [row for row in found if row.own and row.backend not in away]):
        return
    secrets = model._meta.apps.get_model(model._meta.app_label, "SessionSecret")
    # SQLite takes only so many parameters.
    for start in range(0, len(own), _CHUNK):
        chunk = own[start : start + _CHUNK]
        collector.collect(
            secrets._base_manager.using(using).filter(
                backend__in={row.backend for row in chunk},
                session_id__in=[row.session_id for row in chunk],
                owner__in={str(row.user_id) for row in chunk},
            )
        )
    # An id that nobody knows: theirs is free at once.
    name = Concat(Value(f"{uuid.uuid4()}-"), Cast("pk", CharField()))
    changes = {
        "removed_at": timezone.now(),
        "session_id": name,
        "fence": F("fence") + 1,
    }
    # Rows, not a query: Django updates so many of them at a time.
    for column, value in {**changes, field.name: None}.items():
        collector.add_field_update(model._meta.get_field(column), value, own)


# A page loads those that it names.
detach.lazy_sub_objs = True  # type: ignore[attr-defined]


class _Counted(set[Any]):
    """The objects of a model as the page takes them: only their number."""

    more = 0

    def __len__(self) -> int:
        return super().__len__() + self.more


def _count(collector: Any, rows: QuerySet[Any], using: str) -> None:
    """Count rows, and those that go with them."""
    numbers = {rows.model: rows.count()}
    for model, path in _all_followers(rows.model):
        own = model._base_manager.using(using).filter(**{path: OuterRef("pk")})
        number = own.order_by().values(path).annotate(number=Count("*"))
        # By way of each row: to join the tables, PostgreSQL may read all of both.
        counted = rows.annotate(number=Subquery(number.values("number")))
        numbers[model] = counted.aggregate(total=Sum("number"))["total"] or 0
    for model, more in numbers.items():
        if more:
            collector.model_objs.setdefault(model, _Counted()).more += more


def _all_followers(model: type[Model]) -> Iterator[tuple[type[Model], str]]:
    """Return the models whose rows go with this one's, each with the path to it."""
    for follower, name in _followers(model):
        yield follower, name
        yield from (
            (other, f"{path}__{name}") for other, path in _all_followers(follower)
        )


def _asks_rows(model: type[Model]) -> bool:
    """Return whether an admin may refuse to delete single rows: each has to be asked."""
    from django.contrib.admin.sites import all_sites

    admins = [
        site.get_model_admin(model) for site in all_sites if site.is_registered(model)
    ]
    return any(
        admin.has_rules("view", "delete") if hasattr(admin, "has_rules") else True
        for admin in admins
    )


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

    Such rows may be protected, or need permissions of their own.
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
