"""Where earlier readings of conversations went on, so that later ones can begin there.

The service knows its items by id, and pages are asked for by number. An item that is
still there has all items before it, since they are removed from the end alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from agent_sessions.backends.base import Page
from agent_sessions.backends.remote.paging import page_of
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.items import Item
from agent_sessions.items.kinds import opens_turn

# How many conversations a process remembers, and how many places of each.
_CONVERSATIONS = 1_000
_PLACES = 200


@dataclass(frozen=True, slots=True)
class Place:
    """Behind the item of this number and id; `turn` is the one that is open there."""

    position: int = 0
    item: str | None = None
    turn: int = 0

    def behind(self, items: list[Item]) -> Place:
        """Return the place behind more items."""
        turn = self.turn + sum(map(opens_turn, items))
        return Place(self.position + len(items), str(items[-1]["id"]), turn)


START = Place()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which items a page is to hold, as page() is asked for it."""

    before: int | None
    after: int | None
    limit: int

    def begin(self, places: Places, conversation: str) -> Place:
        """Return the nearest known place that lies before all of it."""
        if self.after is not None:
            return places.find(conversation, self.after)
        end = places.newest(conversation) if self.before is None else self.before - 1
        return places.find(conversation, end - self.limit)

    def is_read(self, count: int) -> bool:
        """Return whether the page ends within so many items."""
        if self.after is not None:
            return count >= self.after + self.limit
        return self.before is not None and count >= self.before - 1

    def reaches_back(self, begin: Place, items: list[Item]) -> bool:
        """Return whether a page that ends with these items begins behind the place."""
        if self.after is not None:
            return True
        end = begin.position + len(items)
        if self.before is not None:
            end = min(end, self.before - 1)
        return not begin.position or end - self.limit >= begin.position

    def cut(
        self, begin: Place, items: list[Item], created_at: datetime, *, more: bool
    ) -> Page:
        """Cut the page out of what was read from a place on; tell if more follow."""
        page = page_of(
            items,
            created_at,
            before=self.before,
            after=self.after,
            limit=self.limit,
            begin=(begin.position, begin.turn),
        )
        return Page(page.items, page.has_earlier, page.has_later or more)


class Places:
    """The known places of the conversations that were read last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, OrderedDict[int, Place]] = OrderedDict()
        self._lock = new_lock()

    def find(self, conversation: str, position: int) -> Place:
        """Return the last known place that is not behind a position."""
        with self._lock:
            known = self._known.get(conversation) or OrderedDict[int, Place]()
            fitting = [each for each in known if each <= position]
            return known[max(fitting)] if fitting else START

    def newest(self, conversation: str) -> int:
        with self._lock:
            return max(self._known.get(conversation, {}), default=0)

    def note(self, conversation: str, place: Place) -> None:
        with self._lock:
            known = self._known.setdefault(conversation, OrderedDict())
            self._known.move_to_end(conversation)
            known.pop(place.position, None)
            known[place.position] = place
            if len(known) > _PLACES:
                known.popitem(last=False)
            if len(self._known) > _CONVERSATIONS:
                self._known.popitem(last=False)

    def forget(self, conversation: str) -> None:
        with self._lock:
            self._known.pop(conversation, None)
