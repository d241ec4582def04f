"""Where a turn begins, without reading what lies before it."""

from __future__ import annotations

from typing import Any

from django.db import connections

from agent_sessions.backends.database.lineage import Segment
from agent_sessions.items.kinds import is_opening
from agent_sessions.models import SessionItem

# So few rows are read through rather than searched.
_NEAR = 64

# A row's position and turn.
_Place = tuple[int, int]


def first_of_turn(using: str, segments: tuple[Segment, ...], turn: int) -> int | None:
    """Find the position of the user message that begins a turn.

    Turns grow with positions, so each look halves what is left, or does better: most
    turns have about as many items as their neighbours. No index over turns is needed,
    which every append would pay for.
    """
    for segment in reversed(segments):
        rows = _Rows(using, segment)
        ends = rows.ends()
        if ends is None or ends[1][1] < turn:
            continue
        found = rows.opening(turn, after=_before(rows, turn, ends))
        if found is not None:
            return found
    return None


def _before(rows: _Rows, turn: int, ends: tuple[_Place, _Place]) -> int:
    """Return a position near a turn's beginning, all of which lies behind it."""
    (low, low_turn), (high, high_turn) = ends
    if low_turn >= turn:
        return low - 1
    last = ends[1]
    halve = False
    # So far away the turn would be, were all of the same length.
    while (turn - low_turn) * (high - low) > _NEAR * (high_turn - low_turn):
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

    def first(self, after: int) -> _Place | None:
        """Return the first row after a position."""
        rows = self._fetch(self._part("", "ASC", 1), [self._params(after)])
        return (rows[0][0], rows[0][1]) if rows else None

    def ends(self) -> tuple[_Place, _Place] | None:
        """Return the first row and the last one."""
        both = " UNION ALL ".join(
            f"SELECT * FROM ({self._part('', order, 1)}) AS {order.lower()}_end"
            for order in ("ASC", "DESC")
        )
        rows = self._fetch(both, [self._params(self._after)] * 2)
        if not rows:
            return None
        first, last = sorted((row[0], row[1]) for row in rows)
        return first, last

    def opening(self, turn: int, after: int) -> int | None:
        """Return the position of the first user message of a turn.

        It is looked for here: PostgreSQL, which can't know how near it is, may look for
        the turn in all of the history.
        """
        while True:
            near = self._fetch(
                self._part(", type, role", "ASC", _NEAR), [self._params(after)]
            )
            for position, found, kind, role in near:
                if found == turn and is_opening(kind, role):
                    return int(position)
                if found > turn:
                    return None
            if len(near) < _NEAR:
                return None
            after = near[-1][0]

    def _part(self, columns: str, order: str, limit: int) -> str:
        return (
            f"SELECT position, turn{columns} {self._shown} "
            f"ORDER BY position {order} LIMIT {limit:d}"
        )

    def _params(self, after: int) -> list[Any]:
        return [self._branch, after, *self._upto]

    def _fetch(self, sql: str, params: list[list[Any]]) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, [each for part in params for each in part])
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows
