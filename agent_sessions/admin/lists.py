"""Lists: what their query strings may ask for, their pages and their filters.

A look-up tells a value letter by letter, whether the list shows it or not, and most of
them read every row. So there is an allow-list of columns and look-ups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

from django.contrib.admin import (
    DateFieldListFilter,
    EmptyFieldListFilter,
    FieldListFilter,
    SimpleListFilter,
)
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.utils import get_fields_from_path
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.core.paginator import Page, Paginator
from django.db import DataError, ProgrammingError
from django.db.models import F, Model, Q, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.text import smart_split, unescape_string_literal
from django.utils.translation import gettext_lazy as _

from agent_sessions.approvals import answerable
from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.times import day_of

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
else:
    # Generic for type checkers alone.
    _Paginator = Paginator

# Columns that hold or quote what was said. They need the right to read.
CONTENTS = {
    "agentsession": {"title", "metadata"},
    "sessionitem": {"data", "text"},
    "agentrun": {"state", "usage"},
    "sessionsecret": {"wrapped"},
}
# Whoever sees a list may filter it by any other column of its own, but not by these.
_INTERNAL = {
    "agentsession": {
        "branch",
        "fence",
        "remote_deleting",
        "remote_id",
        "removed_at",
        "run_id",
        "run_owner",
        "run_seen_at",
    },
    "agentrun": {"turn_item"},
}
# What a database raises for a value that no column can hold.
_SQL_ERRORS = (DataError, ProgrammingError)


# -- look-ups --------------------------------------------------------------------------


def names_lookup(model: type[Model], path: str) -> bool:
    """Return whether a path ends in a look-up, not in a column."""
    return len(list(_fields(model, path))) < len(path.split(LOOKUP_SEP))


def words_of(term: str) -> list[str]:
    """Return the words of what is searched for; those in quotes are one."""
    return [
        unescape_string_literal(word)
        if word[0] in "\"'" and word[0] == word[-1]
        else word
        for word in smart_split(term)
    ]


def is_indexed(model: type[Model], lookup: str) -> bool:
    """Return whether a look-up names the value of a harmless column with an index.

    Whatever else may be compared, a list would read all rows for it.
    """
    first, *rest = lookup.split(LOOKUP_SEP)
    field: Any = model._meta.pk if first == "pk" else next(_fields(model, first), None)
    if field is None or not field.concrete:
        return False
    if _is_in(_INTERNAL, field) or _is_in(CONTENTS, field):
        return False
    if field.is_relation and rest:
        # The key of a row that a column points to is in the column itself.
        key = field.related_model._meta.pk
        rest = rest[1:] if rest[0] in {"pk", key.name} else rest
    if rest == ["in"]:
        return bool(field.primary_key)
    return rest in ([], ["exact"]) and (
        field.unique or field.db_index or field.name in _first_columns(model)
    )


def _first_columns(model: type[Model]) -> set[str]:
    """Return the columns with which the indexes of several columns begin."""
    meta = model._meta
    together: Any = (*meta.indexes, *meta.constraints)
    return {each.fields[0].removeprefix("-") for each in together if each.fields}


def reaches_contents(model: type[Model], path: str) -> bool:
    """Return whether a path leads to a column that holds or quotes what was said."""
    return any(
        field.concrete and _is_in(CONTENTS, field) for field in _fields(model, path)
    )


def _is_in(columns: dict[str, set[str]], field: Any) -> bool:
    model = field.model._meta
    return model.app_label == "agent_sessions" and field.name in columns.get(
        model.model_name, ()
    )


def declared(model_admin: Any, request: HttpRequest) -> Iterator[tuple[str, Any]]:
    """Return the parameters that a list's filters take, each with the filter's path."""
    if path := model_admin.date_hierarchy:
        yield from ((f"{path}__{part}", path) for part in ("year", "month", "day"))
    model = model_admin.model
    for item in model_admin.get_list_filter(request):
        path = _filter_path(item)
        if isinstance(item, type):
            spec = item(request, {}, model, model_admin)
        else:
            field = get_fields_from_path(model, path)[-1]
            kind = item[1] if isinstance(item, list | tuple) else FieldListFilter.create
            spec = kind(field, request, {}, model, model_admin, field_path=path)
        yield from ((name, path) for name in spec.expected_parameters())


def _filter_path(item: Any) -> str:
    """Return the path of one entry of `list_filter`; "" where a class does it all."""
    if isinstance(item, type):
        return str(getattr(item, "parameter_name", None) or "")
    item = item[0] if isinstance(item, list | tuple) else item
    return str(getattr(item, "name", item))


def _ordered_by(order: Any) -> list[str]:
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


# -- pages -----------------------------------------------------------------------------


class RuledList(ChangeList):
    """A list of what its reader may view, in an order that tells no more."""

    def get_ordering_field(self, field_name: Any) -> Any:
        if field_name not in (self.sortable_by or ()):
            return None
        name = self._rules.sorted_as.get(field_name)
        return name or super().get_ordering_field(field_name)

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        """Order by each column once, and by the key as an index has it beside."""
        found, rules = super().get_ordering(request, queryset), self._rules
        order: list[Any] = []
        for each in found:
            paths = _ordered_by(each)
            if rules.withholds(request, *paths):
                continue
            if paths == ["pk"]:
                is_down = not order or str(order[0]).startswith("-")
                order.append(each if not order else "-pk" if is_down else "pk")
                break
            if not any(_ordered_by(other) == paths for other in order):
                order.append(each)
        return order

    def get_filters(self, request: HttpRequest) -> Any:
        # A filter names the values of its column.
        self.list_filter = [
            item
            for item in self.list_filter
            if not self._rules.withholds(request, _filter_path(item))
        ]
        return super().get_filters(request)

    def get_results(self, request: HttpRequest) -> None:
        try:
            super().get_results(request)
            rows = list(self.result_list)
        except (ValueError, OverflowError, IndexError, *_SQL_ERRORS) as exc:
            # A value that no column can hold (a NUL, a date before all dates), or one
            # where the look-up takes two.
            raise IncorrectLookupParameters(exc) from exc
        kept = self._rules.shown(request, rows)
        if not self.multi_page:
            self.result_count -= len(rows) - len(kept)
        self.result_list = kept

    @property
    def _rules(self) -> Any:
        return self.model_admin


class CappedPaginator(_Paginator):
    """Count to 10,000 at most: nobody pages further, and counting reads each row."""

    limit = 10_000
    # Leaves out of a page what its reader may not view.
    shown: Callable[[Iterable[Any]], list[Any]] | None = None

    def page(self, number: int | str) -> Page[Any]:
        page = super().page(number)
        if page.start_index() > 1:
            # Keys alone are passed over: whole rows, with what comes along, take long.
            rows: QuerySet[Any] = page.object_list  # type: ignore[assignment]
            keys = list(rows.values_list("pk", flat=True))
            page.object_list = self._rows.filter(pk__in=keys)
        if self.shown is not None:
            page.object_list = self.shown(page.object_list)
        return page

    @cached_property
    def count(self) -> int:
        return min(self._found, self.limit)

    @property
    def is_capped(self) -> bool:
        """Return whether there is more than what is counted."""
        return self._found > self.limit

    @cached_property
    def _found(self) -> int:
        return self._rows.order_by()[: self.limit + 1].count()

    @property
    def _rows(self) -> QuerySet[Any]:
        return self.object_list  # type: ignore[return-value]


# -- filters ---------------------------------------------------------------------------


class StoreFilter(SimpleListFilter):
    """Filter by alias; those of the settings, as finding the used ones scans all."""

    title = _("store")
    parameter_name = "backend"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        aliases = list(sessions)
        return [(alias, alias) for alias in aliases] if len(aliases) > 1 else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        alias = self.value()
        return queryset if alias is None else queryset.filter(backend=alias)


class OwnerFilter(EmptyFieldListFilter):
    """Filter sessions that nobody owns; where none is owned, others are hard to find."""

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.lookup_kwarg in self.used_parameters and self.lookup_val != "1":
            raise IncorrectLookupParameters
        found: QuerySet[Any] = super().queryset(request, queryset)  # type: ignore[assignment]
        return found

    def choices(self, changelist: Any) -> Iterator[Any]:
        # All, and those without an owner.
        return islice(super().choices(changelist), 2)


class StateFilter(SimpleListFilter):
    """Filter sessions by what they are at, by way of their runs, which have an index."""

    title = _("state")
    parameter_name = "state__exact"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        # Where all others wait, those that are idle would be looked for among all.
        states = AgentSession.State
        return [(str(each), each.label) for each in (states.RUNNING, states.WAITING)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        state, states = self.value(), AgentSession.State
        runs = AgentRun._base_manager.using(queryset.db)
        if state == states.RUNNING:
            running = runs.filter(status=AgentRun.Status.RUNNING)
            found = Q(state=state, pk__in=running.values("session_id"))
        elif state == states.WAITING:
            found = Q(pk__in=answerable(runs).values("session_id"))
        else:
            return queryset if state is None else queryset.none()
        return queryset.filter(found)


class ActivityFilter(DateFieldListFilter):
    """Filter sessions by their last activity, in the reader's days.

    The index has the day that day_of() gives: it narrows, the time decides.
    """

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        found: QuerySet[Any] = super().queryset(request, queryset)  # type: ignore[assignment]
        for bound, day in (("gte", "active_on__gte"), ("lt", "active_on__lte")):
            given: Any = self.used_parameters.get(f"{self.field_path}__{bound}", ())
            for text in given:
                try:
                    when = day_of(self.field.get_prep_value(text))
                except (ValidationError, OverflowError) as exc:
                    raise IncorrectLookupParameters(exc) from exc
                found = found.filter(**{day: when})
        return found


class StartedFilter(SimpleListFilter):
    """Filter runs by when they began, in a way that the index serves."""

    title = _("started")
    parameter_name = "days"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("1", _("Past 24 hours")),
            ("7", _("Past 7 days")),
            ("30", _("Past 30 days")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        days = self.value()
        if days not in {"1", "7", "30"}:
            return queryset
        # The index begins with the status.
        return queryset.filter(
            status__in=AgentRun.Status.values,
            started_at__gte=timezone.now() - timedelta(days=int(days)),
        )
