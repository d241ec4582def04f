"""Pages of a long list, without counting all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.utils.functional import cached_property

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
else:
    # Generic for type checkers alone.
    _Paginator = Paginator


class CappedPaginator(_Paginator):
    """Count to 10,000 at most: nobody pages further, and counting reads each row."""

    limit = 10_000

    @cached_property
    def count(self) -> int:
        return min(self._found, self.limit)

    @property
    def is_capped(self) -> bool:
        """Tell whether there is more than what is counted."""
        return self._found > self.limit

    @cached_property
    def _found(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[: self.limit + 1].count()
