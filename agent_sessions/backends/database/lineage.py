"""Which rows a branch shows: its own, and its ancestors' up to each fork."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.db import connections
from django.db.models import Q, QuerySet

from agent_sessions.models import Branch, SessionItem

_CACHE_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one branch that are seen: positions over `after`, up to `upto`.

    `upto` None is open: the branch itself, which grows.
    """

    branch_id: int
    after: int
    upto: int | None = None

    def holds(self, position: int) -> bool:
        """Tell whether a position lies in this segment."""
        return self.after < position and (self.upto is None or position <= self.upto)


class Lineages:
    """The lineages of branches, kept by branch id.

    A branch's parent and fork never change and ids are never given twice, so what
    was read once stays true. A clear takes the ancestors' rows, and nothing to see is
    what their segments then show.
    """

    def __init__(self, using: str) -> None:
        self.using = using
        self._known: OrderedDict[int, tuple[Segment, ...]] = OrderedDict()

    def of(self, branch_id: int) -> tuple[Segment, ...]:
        """Give a branch's segments, newest first."""
        found = self._known.get(branch_id)
        if found is None:
            found = tuple(self._walk(branch_id))
            if connections[self.using].in_atomic_block:
                # A branch that is rolled back leaves its id to another, on SQLite.
                return found
            self._known[branch_id] = found
            if len(self._known) > _CACHE_SIZE:
                self._known.popitem(last=False)
        return found

    def ancestors(self, branch_id: int | None) -> tuple[Segment, ...] | None:
        """Give a branch's segments but its own; None where a look would be needed."""
        found = None if branch_id is None else self._known.get(branch_id)
        return None if found is None else found[1:]

    def _walk(self, branch_id: int) -> Iterator[Segment]:
        branches = Branch.objects.using(self.using)
        session = branches.filter(pk=branch_id).values("session_id")
        family = {
            pk: (parent, fork)
            for pk, parent, fork in branches.filter(session_id__in=session).values_list(
                "pk", "parent_id", "fork_position"
            )
        }
        current: int | None = branch_id
        upto: int | None = None
        while current is not None and current in family:
            parent, fork = family[current]
            yield Segment(current, fork or 0, upto)
            current, upto = parent, fork


def visible(using: str, segments: tuple[Segment, ...]) -> QuerySet[Any]:
    """Give the rows of segments as a query set, in no order."""
    shown = Q()
    for segment in segments:
        part = Q(branch_id=segment.branch_id, position__gt=segment.after)
        if segment.upto is not None:
            part &= Q(position__lte=segment.upto)
        shown |= part
    return SessionItem.objects.using(using).filter(shown)


def segment_of(segments: tuple[Segment, ...], position: int) -> Segment:
    """Find the segment that a fork after `position` grows from.

    Before everything it is the oldest one, the root.
    """
    for segment in segments:
        if segment.holds(position):
            return segment
    return segments[-1]
