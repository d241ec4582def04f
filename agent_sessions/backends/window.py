"""Pages of a history that a store only gives as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from agent_sessions.backends.base import Page
from agent_sessions.items import Item, StoredItem


def page_of(
    items: Sequence[Item],
    created_at: datetime,
    *,
    before: int | None,
    after: int | None,
    limit: int,
) -> Page:
    """Cut a page out of a whole history, oldest first.

    An item's position is its number, from 1, so it stays while items are appended and
    popped. `created_at` stands for the times that the store doesn't tell.
    """
    if after is not None:
        start = min(max(after, 0), len(items))
        stop = min(start + limit, len(items))
    else:
        stop = len(items) if before is None else min(max(before - 1, 0), len(items))
        start = max(stop - limit, 0)
    turn = sum(map(_opens_turn, items[:start]))
    found = []
    for number, item in enumerate(items[start:stop], start + 1):
        turn += _opens_turn(item)
        raw = json.dumps(item, separators=(",", ":"))
        found.append(StoredItem(number, turn, item, raw, created_at))
    return Page(found, start > 0, stop < len(items))


def _opens_turn(item: Item) -> bool:
    kind = item.get("type") or "message"
    return kind == "message" and item.get("role") == "user"
