"""Find the other branches at each turn of a page: what else was asked there."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from django.db.models import F, OuterRef, Subquery

from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Segment, family, walk
from agent_sessions.backends.keys import Page
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import SessionItem

# Behind every position.
_END = 2**63


@dataclass(frozen=True, slots=True)
class _Line:
    pk: int
    parent: int | None
    fork: int | None
    name: str
    is_active: bool
    is_current: bool
    # The position of its own last item, 0 without one.
    last: int


# The branches that leave the current one after a position: by the key of the branch
# that has their next item, the name of the one to switch to.
Leaving = Mapping[int, Mapping[int, str]]


def with_siblings(branches: Branches, page: Page, before: int | None = None) -> Page:
    """Return a page that names its branch, and for each turn the branches beside it.

    One query, however many branches there are. `before` is the page's own bound.
    """
    lines = _read(branches)
    current = next((line for line in lines if line.is_current), None)
    if current is None:
        return page
    own = _segments(lines, current)
    leaving = _leaving(lines, current, own)
    points = sorted(leaving)

    def beside(after: int, upto: int) -> dict[str, Any] | None:
        """Describe those that leave from a position on and before another."""
        chosen = points[bisect_left(points, after) : bisect_left(points, upto)]
        found = {pk: name for at in chosen for pk, name in leaving[at].items()}
        holds = (each.branch_id for each in own if each.holds(upto))
        return _place(found, next(holds, current.pk), current.name)

    items = list(page.items)
    previous = items[0].position - 1 if items and page.has_earlier else 0
    for index, entry in enumerate(items):
        if opens_turn(entry.item or {}):
            siblings = beside(previous, entry.position)
            items[index] = replace(entry, siblings=siblings)
        previous = entry.position
    end = beside(previous, _END if before is None else before)
    return replace(page, items=items, branch=current.name, siblings=end)


def _read(branches: Branches) -> list[_Line]:
    own = SessionItem._base_manager.using(branches.using).filter(
        branch_id=OuterRef("pk")
    )
    rows = (
        branches.every()
        .filter(is_quarantine=False)
        .annotate(
            last=Subquery(own.order_by("-position").values("position")[:1]),
            current=F("session__branch_id"),
        )
        .order_by("pk")
    )
    chosen = branches.key.branch
    return [
        _Line(
            row.pk,
            row.parent_id,
            row.fork_position,
            row.name,
            is_active := not row.version and row.archived_at is None,
            row.pk == row.current
            if chosen is None
            else is_active and row.name == chosen,
            row.last or 0,
        )
        for row in rows
    ]


def _segments(lines: list[_Line], line: _Line) -> tuple[Segment, ...]:
    rows = ((each.pk, each.parent, each.fork) for each in lines)
    return walk(family(rows), line.pk)[::-1]


def _leaving(lines: list[_Line], current: _Line, own: tuple[Segment, ...]) -> Leaving:
    by_key = {line.pk: line for line in lines}
    branches = family((line.pk, line.parent, line.fork) for line in lines)
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for line in lines:
        if not line.is_active or line is current:
            continue
        other = walk(branches, line.pk)[::-1]
        pairs = zip(own, other, strict=False)
        shared = list(
            takewhile(lambda two: two[0].branch_id == two[1].branch_id, pairs)
        )
        if not shared:
            continue
        at = min(map(_upto, shared[-1]))
        for segment in other[len(shared) - 1 :]:
            owner = by_key[segment.branch_id]
            if min(owner.last, _upto(segment)) > max(segment.after, at):
                # The branch that holds the turn stands for those that grew from it.
                if line is owner or not owner.is_active:
                    found[at][owner.pk] = line.name
                break
    return found


def _upto(segment: Segment) -> int:
    return _END if segment.upto is None else segment.upto


def _place(found: dict[int, str], own: int, name: str) -> dict[str, Any] | None:
    """Return the place of a branch among others, oldest first, and its neighbours."""
    if not found:
        return None
    names = {**found, own: name}
    order = sorted(names)
    index = order.index(own)
    place: dict[str, Any] = {"place": index + 1, "count": len(order)}
    if index:
        place["previous"] = names[order[index - 1]]
    if index + 1 < len(order):
        place["next"] = names[order[index + 1]]
    return place
