"""Lists and pages that ask their hooks about each row, and no column they may not."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import BadRequest
from django.core.paginator import Paginator
from django.db import DataError, ProgrammingError
from django.db.models import QuerySet
from django.http import HttpRequest

from agent_sessions.admin.lookups import (
    REGEX,
    declared,
    filter_path,
    is_harmless,
    names_column,
    ordered_by,
    reaches_contents,
)
from agent_sessions.admin.paginator import CappedPaginator
from agent_sessions.admin.permissions import hides

_SQL_ERRORS = (DataError, ProgrammingError)
# What every database can store as a key.
MAX_KEY = 2**63 - 1

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    # Generic for type checkers alone.
    _ModelAdmin = admin.ModelAdmin


class RuledList(ChangeList):
    """A list of what its reader may view, in an order that tells no more."""

    def get_ordering_field(self, field_name: Any) -> Any:
        if field_name not in (self.sortable_by or ()):
            return None
        return super().get_ordering_field(field_name)

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        found = super().get_ordering(request, queryset)
        return [
            order for order in found if not self._withholds(request, *ordered_by(order))
        ]

    def get_filters(self, request: HttpRequest) -> Any:
        # A filter names the values of its column.
        self.list_filter = [
            item
            for item in self.list_filter
            if not self._withholds(request, filter_path(item))
        ]
        return super().get_filters(request)

    def _withholds(self, request: HttpRequest, *paths: str) -> bool:
        site_admin: Any = self.model_admin
        return bool(site_admin.withholds(request, *paths))

    def get_results(self, request: HttpRequest) -> None:
        try:
            super().get_results(request)
            rows = list(self.result_list)
        except (ValueError, OverflowError, IndexError, *_SQL_ERRORS) as exc:
            # A value that no column can hold (a NUL, a date before all dates), or one
            # where the look-up takes two.
            raise IncorrectLookupParameters(exc) from exc
        site_admin: Any = self.model_admin
        kept = site_admin.shown(request, rows)
        if not self.multi_page:
            self.result_count -= len(rows) - len(kept)
        self.result_list = kept


class RowRules(_ModelAdmin):
    """What the admins of sessions and runs have in common."""

    # By these anyone who sees the list may filter: it shows them.
    harmless: ClassVar[frozenset[str]] = frozenset()

    def is_hidden(self, request: HttpRequest, obj: Any) -> bool:
        """Return whether a row does not exist for this reader, who may view others."""
        return hides(self, request, obj)

    def asks_rows(self) -> bool:
        """Return whether a hook of a project's own may hide single rows."""
        raise NotImplementedError

    def shown(self, request: HttpRequest, rows: Iterable[Any]) -> list[Any]:
        """Leave out the rows that do not exist for this reader."""
        if not self.asks_rows():
            return list(rows)
        return [row for row in rows if not self.is_hidden(request, row)]

    def reads_all(self, request: HttpRequest) -> bool:
        """Return whether the reader may read what was said in every row of the list."""
        raise NotImplementedError

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        # Django takes an empty name for a field's.
        obj = super().get_object(request, object_id, from_field or None)
        return None if obj is None or self.is_hidden(request, obj) else obj

    # -- lists ---------------------------------------------------------------------

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return RuledList

    def get_paginator(
        self, request: HttpRequest, queryset: Any, *args: Any, **kwargs: Any
    ) -> Paginator[Any]:
        related: Any = self.get_list_select_related(request) or ()
        if not (queryset.query.select_related or related in (True, ())):
            # Hooks ask for the owner. Lists have it joined already.
            queryset = queryset.select_related(*related)
        paginator = super().get_paginator(request, queryset, *args, **kwargs)
        if isinstance(paginator, CappedPaginator):
            # Suggestions of a field (autocomplete_fields) take their rows from it.
            paginator.shown = partial(self.shown, request)
        return paginator

    def withholds(self, request: HttpRequest, *paths: str) -> bool:
        """Return whether one of these paths leads to what the reader may not read."""
        return any(
            reaches_contents(self.model, path) for path in paths
        ) and not self.reads_all(request)

    def get_search_fields(self, request: HttpRequest) -> Any:
        found = super().get_search_fields(request)
        return [
            path for path in found if not self.withholds(request, path.lstrip("^=@"))
        ]

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        # PostgreSQL takes no NUL, and no row has one.
        term = search_term.replace("\x00", "")
        found, many = super().get_search_results(request, queryset, term)
        for form in ("NFC", "NFD"):
            # The same letters, composed or not.
            if (other := unicodedata.normalize(form, term)) != term:
                more, also = super().get_search_results(request, queryset, other)
                found, many = found | more, many or also
        return found, many

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        """Allow columns that the list shows, and the filters that it has.

        What a value is plays no part, so that a refusal tells nothing about rows.
        """
        if is_harmless(self.model, self.harmless, lookup):
            return True
        if request is None or not REGEX.isdisjoint(lookup.split("__")):
            return False
        paths = declared(self, request)
        if not names_column(self.model, lookup):
            # A parameter of a filter, as `long` or `item_count_from`.
            first = lookup.partition("__")[0]
            return any(lookup.startswith(path) for path in paths) and (
                first not in self.get_queryset(request).query.annotations
            )
        if not any(lookup == path or lookup.startswith(f"{path}__") for path in paths):
            return False
        if self.withholds(request, lookup):
            return False
        return super().lookup_allowed(lookup, value, request)

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> Any:
        for key in request.POST.getlist(ACTION_CHECKBOX_NAME):
            if as_key(key) is None:
                raise BadRequest("The keys of selected rows are numbers.")
        return super().changelist_view(request, extra_context)


def as_key(text: str) -> int | None:
    """Read a key or position in an address; None if no database can hold it."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        return None
    number = int(text)
    return number if number <= MAX_KEY else None
