"""Which rows a branch shows: its own, and its ancestors' up to each fork."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import Q, QuerySet, Subquery

from agent_sessions.items.kinds import is_opening
from agent_sessions.models import Branch, SessionItem

# So few rows are read through rather than searched.
_NEAR = 64
# The last position that there can be.
_LAST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one branch that are seen: positions over `after`, up to `upto`.

    `upto` None is open: the branch itself, which grows.
    """

    branch_id: int
    after: int
    upto: int | None = None

    def holds(self, position: int) -> bool:
        """Return whether a position lies in this segment."""
        return self.after < position and (self.upto is None or position <= self.upto)


# A branch's parent and the position it forks at, by its id.
Family = dict[int, tuple[int | None, int | None]]


class Lineages:
    """The lineages of branches, read once in one operation.

    They are not kept any longer: a restored backup gives the ids of branches to other
    branches, of other people's sessions, while the process goes on.
    """

    def __init__(self, using: str) -> None:
        self.using = using
        self._families: Family = {}

    def of(self, branch_id: int) -> tuple[Segment, ...]:
        """Return a branch's segments, newest first."""
        if branch_id not in self._families:
            branches = Branch._base_manager.using(self.using)
            session = branches.filter(pk=branch_id).values("session_id")[:1]
            rows = branches.filter(session_id=Subquery(session))
            self._families |= family(
                rows.values_list("pk", "parent_id", "fork_position")
            )
        return walk(self._families, branch_id)


def family(rows: Iterable[Sequence[Any]]) -> Family:
    """Return the branches of a session by id, from rows of id, parent and fork."""
    return {pk: (parent, fork) for pk, parent, fork in rows}


def walk(branches: Family, branch_id: int) -> tuple[Segment, ...]:
    """Return a branch's segments, newest first."""
    segments: dict[int, Segment] = {}
    current: int | None = branch_id
    upto: int | None = None
    # A branch that a broken row makes its own ancestor ends the walk.
    while current is not None and current in branches and current not in segments:
        parent, fork = branches[current]
        segments[current] = Segment(current, fork or 0, upto)
        current, upto = parent, fork
    return tuple(segments.values())


def visible(using: str, segments: tuple[Segment, ...]) -> QuerySet[Any]:
    """Return the rows of segments as a query set, in no order."""
    shown = Q()
    for segment in segments:
        part = Q(branch_id=segment.branch_id, position__gt=segment.after)
        if segment.upto is not None:
            part &= Q(position__lte=segment.upto)
        shown |= part
    return SessionItem._base_manager.using(using).filter(shown)


def segment_of(segments: tuple[Segment, ...], position: int) -> Segment:
    """Find the segment that a fork after `position` grows from.

    Before everything it is the oldest one, the root.
    """
    for segment in segments:
        if segment.holds(position):
            return segment
    return segments[-1]


def first_of_turn(using: str, segments: tuple[Segment, ...], turn: int) -> int | None:
    """Find the position of the user message that begins a turn.

    Turns grow with positions, and most have about as many items as their neighbours.
    No index over turns is needed, which every append would pay for.
    """
    for segment in reversed(segments):
        found = _opening(partial(_read, using, segment), segment.after, turn)
        if found is not None:
            return found
    return None


def _read(
    using: str, segment: Segment, after: int, limit: int = 1, order: str = "ASC"
) -> list[Any]:
    """Read a segment's rows after a position; a query set takes ten times as long."""
    connection = connections[using]
    table = connection.ops.quote_name(SessionItem._meta.db_table)
    upto = _LAST if segment.upto is None else segment.upto
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT position, turn, type, role FROM {table} "  # noqa: S608 - no input
            "WHERE branch_id = %s AND position > %s AND position <= %s "
            f"ORDER BY position {order} LIMIT {limit:d}",
            [segment.branch_id, after, upto],
        )
        return list(cursor.fetchall())


def _opening(read: Callable[..., list[Any]], after: int, turn: int) -> int | None:
    """Find the row that opens a turn among those after a position."""
    ends = [*read(after), *read(after, order="DESC")]
    if not ends or ends[-1][1] < turn:
        return None
    if ends[0][1] < turn:
        after = _shortly_before(read, ends, turn)
    while near := read(after, _NEAR):
        for position, number, kind, role in near:
            if number >= turn:
                is_found = number == turn and is_opening(kind, role)
                return int(position) if is_found else None
        after = near[-1][0]
    return None


def _shortly_before(read: Callable[..., list[Any]], ends: list[Any], turn: int) -> int:
    """Return a position from which a turn is probably near."""
    (low, low_turn, *_), (high, high_turn, *_) = ends
    halve = False
    # So far away the turn would be, were all of the same length.
    while (turn - low_turn) * (high - low) > _NEAR * (high_turn - low_turn):
        share = 0.5 if halve else (turn - low_turn - 0.5) / (high_turn - low_turn)
        # Where turns are of very different lengths, guesses creep: halve in between.
        halve = not halve
        middle = min(low + int((high - low) * share), high - 1)
        found, found_turn, *_ = (read(middle) or ends[-1:])[0]
        if found_turn < turn:
            low, low_turn = found, found_turn
        else:
            high, high_turn = middle, found_turn
    return int(low)
