"""Where a turn begins, without reading what lies before it."""

from __future__ import annotations

from typing import Any

from django.db import connections

from agent_sessions.backends.database.lineage import Segment
from agent_sessions.models import SessionItem

# So few rows are read through rather than searched.
_NEAR = 64


def first_of_turn(using: str, segments: tuple[Segment, ...], turn: int) -> int | None:
    """Find the position of the user message that begins a turn.

    Turns grow with positions, so each look halves what is left, or does better: most
    turns have about as many items as their neighbours. No index over turns is needed,
    which every append would pay for.
    """
    for segment in reversed(segments):
        rows = _Rows(using, segment)
        last = rows.last()
        if last is None or last[1] < turn:
            continue
        found = rows.opening(turn, after=_before(rows, turn, last))
        if found is not None:
            return found
    return None


def _before(rows: _Rows, turn: int, last: tuple[int, int]) -> int:
    """Give a position near a turn's beginning, all of which lies behind it."""
    low, low_turn = rows.first() or last
    if low_turn >= turn:
        return low - 1
    high, high_turn = last
    halve = False
    while high - low > _NEAR:
        share = 0.5 if halve else (turn - low_turn - 0.5) / (high_turn - low_turn)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        found, found_turn = rows.first(after=middle - 1) or last
        # Where turns are of very different lengths, guesses creep: halve in between.
        halve = not halve
        if found_turn < turn:
            low, low_turn = found, found_turn
        else:
            high, high_turn = middle, found_turn
    return low


class _Rows:
    """Positions and turns of what a segment shows; a query set takes longer to build."""

    def __init__(self, using: str, segment: Segment) -> None:
        self._connection = connections[using]
        self._after = segment.after
        quote = self._connection.ops.quote_name
        # One lower bound: of two, SQLite may take the one that leaves more to read.
        self._shown = (
            f"FROM {quote(SessionItem._meta.db_table)} "
            "WHERE branch_id = %s AND position > %s"
        )
        self._upto: list[int] = []
        if segment.upto is not None:
            self._shown += " AND position <= %s"
            self._upto = [segment.upto]
        self._branch = segment.branch_id

    def first(self, after: int | None = None) -> tuple[int, int] | None:
        """Give the first row, or the first after a position."""
        return self._row("ASC", after)

    def last(self) -> tuple[int, int] | None:
        """Give the last row."""
        return self._row("DESC", None)

    def opening(self, turn: int, after: int) -> int | None:
        """Give the position of the first user message of a turn.

        It is looked for here: PostgreSQL, which can't know how near it is, may look for
        the turn in all of the history.
        """
        while True:
            near = self._execute(", type, role", "ASC", after, _NEAR)
            for position, found, kind, role in near:
                if found == turn and (kind, role) == ("message", "user"):
                    return int(position)
                if found > turn:
                    return None
            if len(near) < _NEAR:
                return None
            after = near[-1][0]

    def _row(self, order: str, after: int | None) -> tuple[int, int] | None:
        rows = self._execute("", order, self._after if after is None else after, 1)
        return (rows[0][0], rows[0][1]) if rows else None

    def _execute(
        self, columns: str, order: str, after: int, limit: int
    ) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(
                f"SELECT position, turn{columns} {self._shown} "
                f"ORDER BY position {order} LIMIT {limit:d}",
                [self._branch, after, *self._upto],
            )
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows
