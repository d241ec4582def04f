"""Pages of a history that a store only gives as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from agent_sessions.backends.base import Page
from agent_sessions.items import Item, StoredItem
from agent_sessions.items.kinds import opens_turn


def page_of(
    items: Sequence[Item],
    created_at: datetime,
    *,
    before: int | None,
    after: int | None,
    limit: int,
    begin: tuple[int, int] = (0, 0),
) -> Page:
    """Cut a page out of a history, oldest first.

    An item's position is its number, from 1, so it stays while items are appended and
    popped. `created_at` stands for the times that the store doesn't tell; `begin` is
    how many items and turns lie before the ones given.
    """
    skipped, turn = begin
    end = skipped + len(items)
    if after is not None:
        start = min(max(after, skipped), end)
        stop = min(start + limit, end)
    else:
        stop = end if before is None else min(max(before - 1, skipped), end)
        start = max(stop - limit, skipped)
    turn += sum(map(opens_turn, items[: start - skipped]))
    found = []
    for number, item in enumerate(items[start - skipped : stop - skipped], start + 1):
        turn += opens_turn(item)
        raw = json.dumps(item, separators=(",", ":"))
        # A copy, since the store may have given its own.
        found.append(StoredItem(number, turn, json.loads(raw), raw, created_at))
    return Page(found, start > 0, stop < end)
