"""What the query string of a list may ask for: an allow-list of columns and look-ups.

A look-up tells a value letter by letter, whether the list shows it or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from django.core.exceptions import FieldDoesNotExist
from django.db.models import F, Model
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest

# Columns that hold or quote what was said. They need the right to read.
CONTENTS = {
    "agentsession": {"title", "metadata"},
    "sessionitem": {"data", "text"},
    "agentrun": {"state", "usage"},
    "sessionsecret": {"wrapped"},
}
# SQLite runs them in Python, for as long as they take.
REGEX = frozenset({"regex", "iregex"})
LOOKUPS = frozenset(
    [
        "exact",
        "iexact",
        "in",
        "isnull",
        "isempty",
        "gt",
        "gte",
        "lt",
        "lte",
        "contains",
        "icontains",
        "startswith",
        "istartswith",
        "endswith",
        "iendswith",
        "date",
        "year",
        "quarter",
        "month",
        "week",
        "week_day",
        "day",
    ]
)


def names_column(model: type[Model], lookup: str) -> bool:
    """Return whether a look-up begins with a column, relation or key of a model."""
    first = lookup.partition(LOOKUP_SEP)[0]
    return first == "pk" or bool(list(_fields(model, first)))


def is_harmless(model: type[Model], columns: Collection[str], lookup: str) -> bool:
    """Return whether a look-up compares one of these columns, and nothing behind it."""
    first, *rest = lookup.split(LOOKUP_SEP)
    field = next(_fields(model, first), None)
    if first != "pk" and (field is None or field.name not in columns):
        return False
    if field is not None and field.is_relation and rest:
        # The key of a row that a column points to is in the column itself.
        key = field.related_model._meta.pk
        rest = rest[1:] if rest[0] in {"pk", key.name} else rest
    return LOOKUPS.issuperset(rest)


def reaches_contents(model: type[Model], path: str) -> bool:
    """Return whether a path leads to a column that holds or quotes what was said."""
    return any(
        field.model._meta.app_label == "agent_sessions"
        and field.name in CONTENTS.get(field.model._meta.model_name, ())
        for field in _fields(model, path)
        if not (field.auto_created and not field.concrete)
    )


def declared(model_admin: Any, request: HttpRequest) -> list[str]:
    """Return the paths and parameters of the filters that a list has."""
    found = [model_admin.date_hierarchy]
    for item in model_admin.get_list_filter(request):
        path = filter_path(item)
        if path or not isinstance(item, type):
            found.append(path)
        else:
            spec = item(request, {}, model_admin.model, model_admin)
            found += spec.expected_parameters()
    return [path for path in found if path]


def filter_path(item: Any) -> str:
    """Return the path of one entry of `list_filter`; "" where a class does it all."""
    if isinstance(item, type):
        return str(getattr(item, "parameter_name", None) or "")
    item = item[0] if isinstance(item, list | tuple) else item
    return str(getattr(item, "name", item))


def ordered_by(order: Any) -> list[str]:
    """Return the paths that an ordering reads: a name, an F() or an expression."""
    if isinstance(order, str):
        return [order.removeprefix("-")]
    parts: list[Any] = list(order.flatten()) if hasattr(order, "flatten") else [order]
    columns: list[Any] = [part for part in parts if isinstance(part, F)]
    return [str(column.name) for column in columns]


def _fields(model: type[Model], path: str) -> Iterator[Any]:
    """Return the fields that a path goes through."""
    current: Any = model
    for part in path.split(LOOKUP_SEP):
        try:
            field = current._meta.get_field(part)
        except FieldDoesNotExist:
            return
        yield field
        current = field.related_model
        if current is None:
            return
