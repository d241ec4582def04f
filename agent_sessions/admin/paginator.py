"""Pages of a long list, without counting all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from django.core.paginator import Page, Paginator
from django.db.models import QuerySet
from django.utils.functional import cached_property

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
    _Page = Page[Any]
else:
    # Generic for type checkers alone.
    _Paginator, _Page = Paginator, Page


class CappedPaginator(_Paginator):
    """Count to 10,000 at most: nobody pages further, and counting reads each row."""

    limit = 10_000
    # Leaves out of a page what its reader may not view.
    shown: Callable[[Iterable[Any]], list[Any]] | None = None

    def page(self, number: int | str) -> _Page:
        page = super().page(number)
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
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[: self.limit + 1].count()
