"""What is known of conversations: their counts, and where earlier readings went on.

The service knows its items by id, and pages are asked for by number. An item that is
still there has all items before it, since they are removed from the end alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from agent_sessions.backends.remote.paging import Stretch
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.items import Item
from agent_sessions.items.kinds import opens_turn

# How many conversations a process remembers, and how many cursors of each.
_CONVERSATIONS = 2_000
_CURSORS = 200


@dataclass(frozen=True, slots=True)
class Cursor:
    """Behind the item of this number and id; `turn` is the one that is open there."""

    position: int = 0
    item: str | None = None
    turn: int = 0

    def behind(self, items: list[Item]) -> Cursor:
        """Return the cursor behind more items."""
        return Cursor(
            self.position + len(items),
            str(items[-1]["id"]),
            self.turn + sum(map(opens_turn, items)),
        )


START = Cursor()


class _Known:
    """How many items a conversation has, if that is known, and its cursors."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.cursors: OrderedDict[int, Cursor] = OrderedDict()


class KnownConversations:
    """What a process remembers of the conversations that were used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = new_lock()

    def before(self, conversation: str, wanted: Stretch) -> Cursor:
        """Return the nearest known cursor before all of a page."""
        with self._lock:
            known = self._known.get(conversation, _Known()).cursors
            position = wanted.after
            if position is None:
                end = max(known, default=0)
                end = end if wanted.before is None else wanted.before - 1
                position = end - wanted.limit
            fitting = [each for each in known if each <= position]
            return known[max(fitting)] if fitting else START

    def note(self, conversation: str, cursor: Cursor) -> None:
        """Remember a cursor; the ones that were used least go."""
        with self._lock:
            known = self._use(conversation).cursors
            known.pop(cursor.position, None)
            known[cursor.position] = cursor
            if len(known) > _CURSORS:
                known.popitem(last=False)

    def count(self, conversation: str, count: int) -> None:
        """Remember how many items there are."""
        with self._lock:
            self._use(conversation).count = count

    def add(self, conversation: str, more: int) -> int | None:
        """Return how many items there are with some more; None if that is unknown."""
        with self._lock:
            known = self._known.get(conversation)
            if known is None or known.count is None:
                return None
            known.count = max(0, known.count + more)
            return known.count

    def forget_cursors(self, conversation: str) -> None:
        """Forget a conversation's cursors: an item of theirs was removed."""
        with self._lock:
            if conversation in self._known:
                self._known[conversation].cursors.clear()

    def forget(self, conversation: str) -> None:
        """Forget a conversation, which is deleted."""
        with self._lock:
            self._known.pop(conversation, None)

    def _use(self, conversation: str) -> _Known:
        known = self._known.setdefault(conversation, _Known())
        self._known.move_to_end(conversation)
        if len(self._known) > _CONVERSATIONS:
            self._known.popitem(last=False)
        return known
