"""Transactions of about so many items, and the statement that fills them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import connections, transaction

from agent_sessions.models import SessionItem

_COLUMNS = (
    "branch_id",
    "position",
    "turn",
    "data",
    "type",
    "role",
    "call_id",
    "tool_name",
    "text",
    "size",
    "created_at",
)
# Rows of one INSERT: they save round trips, and stay below what a packet may hold.
_ROWS = 200
_BYTES = 4 * 1024 * 1024


class Batches:
    """Transactions that hold for about so many items, whichever sessions' they are."""

    def __init__(self, using: str, size: int) -> None:
        self.using = using
        self.size = size
        # Grows with every transaction: who holds a lock sees when it is gone.
        self.number = 0
        self._atomic: Any = None
        self._pending = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Commit what is left at the end; an error rolls the last batch back."""
        try:
            yield
        except BaseException as exc:
            self._end(type(exc), exc, exc.__traceback__)
            raise
        self._end(None, None, None)

    def begin(self) -> None:
        """Open a transaction where none is open."""
        if self._atomic is None:
            self.number += 1
            self._pending = 0
            self._atomic = transaction.atomic(self.using)
            self._atomic.__enter__()

    def count(self, items: int) -> None:
        """Count what was written, and commit when it is enough."""
        self._pending += items
        if self._pending >= self.size:
            self._end(None, None, None)

    def _end(self, *exc: Any) -> None:
        atomic, self._atomic = self._atomic, None
        if atomic is not None:
            atomic.__exit__(*exc)


def insert(using: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of items, whose columns are in `_COLUMNS`' order."""
    connection = connections[using]
    quote = connection.ops.quote_name
    into = (
        f"INSERT INTO {quote(SessionItem._meta.db_table)} "
        f"({', '.join(map(quote, _COLUMNS))}) VALUES "
    )
    one = "(" + ", ".join(["%s"] * len(_COLUMNS)) + ")"
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.executemany(into + one, rows)
            return
        for chunk in _chunks(rows):
            cursor.execute(
                into + ", ".join([one] * len(chunk)),
                [value for row in chunk for value in row],
            )


def _chunks(rows: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    chunk: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        # Its JSON and the text drawn from it.
        length = len(row[3]) + len(row[8])
        if chunk and (len(chunk) == _ROWS or size + length > _BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += length
    if chunk:
        yield chunk
