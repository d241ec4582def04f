"""Parts of a history: pages of what is read whole, and the newest readable items."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from agent_sessions.backends.base import Page
from agent_sessions.items import Item, StoredItem
from agent_sessions.items.kinds import opens_turn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which items a page is to hold, as page() is asked for them."""

    before: int | None = None
    after: int | None = None
    limit: int = 100

    @property
    def last(self) -> int | None:
        """The last position that need be read; None for the newest."""
        if self.after is not None:
            return self.after + self.limit
        return None if self.before is None else self.before - 1

    def bounds(self, first: int, end: int) -> tuple[int, int]:
        """Return the part of the positions first + 1 to end that the page holds.

        Its first position is one more than the first number returned.
        """
        if self.after is not None:
            start = min(max(self.after, first), end)
            return start, min(start + self.limit, end)
        stop = end if self.before is None else min(max(self.before - 1, first), end)
        return max(stop - self.limit, first), stop

    def cut(
        self,
        items: Sequence[Item],
        created_at: datetime,
        *,
        skipped: int = 0,
        turn: int = 0,
    ) -> Page:
        """Cut the page out of a history, oldest first.

        An item's position is its number, from 1, so it stays while items are appended
        and popped. `created_at` stands for the times that the store doesn't tell;
        `skipped` items with `turn` turns lie before the ones given.
        """
        end = skipped + len(items)
        start, stop = self.bounds(skipped, end)
        turn += sum(map(opens_turn, items[: start - skipped]))
        found = []
        for number, item in enumerate(
            items[start - skipped : stop - skipped], start + 1
        ):
            turn += opens_turn(item)
            raw = json.dumps(item, separators=(",", ":"))
            # A copy, since the store may have given its own.
            found.append(
                StoredItem(
                    number, turn, json.loads(raw), raw, created_at, is_timed=False
                )
            )
        return Page(found, start > 0, stop < end)


async def read_readable(
    read: Callable[[int | None], Awaitable[Sequence[T]]],
    decode: Callable[[T], Item | None],
    limit: int | None,
) -> tuple[list[Item], bool]:
    """Read back from the end of a history until it gives `limit` readable items.

    `read` gives so many of the newest entries, oldest first, or all for None. Return
    the readable ones, perhaps more than `limit`, and whether that is the whole history.
    """
    window = limit
    while True:
        entries = await read(window)
        items = [item for each in entries if (item := decode(each)) is not None]
        if limit is None or window is None or len(entries) < window:
            return items, True
        if len(items) >= limit:
            return items, False
        window *= 2
