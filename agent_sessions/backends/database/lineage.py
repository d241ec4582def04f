"""Which rows a branch shows: its own, and its ancestors' up to each fork."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Q, QuerySet

from agent_sessions.items.kinds import is_opening
from agent_sessions.models import Branch, SessionItem

# So few rows are read through rather than searched.
_NEAR = 64


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
            session = branches.filter(pk=branch_id).values("session_id")
            rows = branches.filter(session_id__in=session)
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

    Turns grow with positions, so each look halves what is left. No index over turns
    is needed, which every append would pay for.
    """
    items = SessionItem._base_manager.using(using)
    for segment in reversed(segments):
        rows = items.filter(branch_id=segment.branch_id).order_by("position")
        rows = rows.values_list("position", "turn", "type", "role")
        if segment.upto is not None:
            rows = rows.filter(position__lte=segment.upto)
        last = rows.last()
        low, high = segment.after, 0 if last is None else last[0]
        while high - low > _NEAR:
            middle = (low + high) // 2
            row = rows.filter(position__gt=middle).first()
            if row is not None and row[1] < turn:
                low = row[0]
            else:
                high = middle
        for position, number, kind, role in rows.filter(position__gt=low)[: _NEAR + 1]:
            if number >= turn:
                if number == turn and is_opening(kind, role):
                    return int(position)
                break
    return None
