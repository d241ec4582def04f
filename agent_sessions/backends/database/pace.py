"""How long a removal holds SQLite, which has one writer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from django.db import connections

P = ParamSpec("P")
T = TypeVar("T")

# Who waits looks again only now and then, after 50 milliseconds or 100 in the end: the
# database is left alone for this many times as long as it was held.
REST = 3.5
# Seconds of work after which a transaction was a long one, and how few rows are enough.
# Some milliseconds of each go by for any number of rows.
_LONG = 0.03
_LEAST = 100


class Pace:
    """How many rows one transaction removes, and how long others have afterwards.

    On SQLite others wait for it. A busy machine takes many times as long for the same
    rows: those of the next transaction follow from what this one took.
    """

    def __init__(self, using: str, most: int) -> None:
        connection = connections[using]
        self.most = self.size = most
        self._counts = connection.vendor == "sqlite" and not connection.in_atomic_block
        self._least = min(_LEAST, most)
        if self._counts:
            self.size = max(most // 4, self._least)
        self._began, self._worked = time.monotonic(), 0.0

    def timed(self, work: Callable[P, T]) -> Callable[P, T]:
        """Return a transaction's work, which is measured from when it may begin."""

        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            self._began = time.monotonic()
            try:
                return work(*args, **kwargs)
            finally:
                self._worked = time.monotonic() - self._began

        return run

    def rest(self, times: float = REST) -> None:
        """Pause in proportion to the transaction that has just ended."""
        if not self._counts:
            return
        # The disk takes as long to store few rows as many.
        if self._worked > _LONG:
            self.size = max(self.size // 2, self._least)
        elif self._worked < _LONG / 3:
            self.size = min(self.size * 2, self.most)
        time.sleep((time.monotonic() - self._began) * times)
