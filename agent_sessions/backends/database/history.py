"""What is done to stored histories through the ORM, off the hottest path."""

from __future__ import annotations

from agent_sessions.backends.base import Page
from agent_sessions.backends.database.branches import Branches
from agent_sessions.items import StoredItem, decode


def read_page(
    branches: Branches, *, before: int | None, after: int | None, limit: int
) -> Page:
    """Read a stretch of a history, oldest first, and whether more lies around it."""
    branch = branches.current()
    if branch is None:
        return Page([], False)
    rows = branches.items(branch)
    wanted = rows.values_list("position", "turn", "data", "created_at")
    if after is None:
        if before is not None:
            wanted = wanted.filter(position__lt=before)
        found = list(wanted.order_by("-position")[: limit + 1])
        has_earlier = len(found) > limit
        found = found[:limit][::-1]
        has_later = before is not None and rows.filter(position__gte=before).exists()
    else:
        wanted = wanted.filter(position__gt=after)
        found = list(wanted.order_by("position")[: limit + 1])
        has_later = len(found) > limit
        found = found[:limit]
        has_earlier = rows.filter(position__lte=after).exists()
    items = [
        StoredItem(position, turn, decode(data), data, created_at)
        for position, turn, data, created_at in found
    ]
    return Page(items, has_earlier, has_later)
