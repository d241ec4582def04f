"""What a process remembers of sessions' rows, so that it need not ask at each use."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from agent_sessions.backends.base import SessionKey
from agent_sessions.concurrency.forks import new_lock

# How many sessions a process remembers.
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class PendingUpdate:
    """What is to be written into a session's row: its count, and its first title."""

    count: int | None = None
    title: str = ""

    def then(self, later: PendingUpdate) -> PendingUpdate:
        """Return what is to be written after both."""
        count = self.count if later.count is None else later.count
        return PendingUpdate(count, self.title or later.title)


@dataclass(slots=True)
class _Entry:
    """A row that was found or made, and when it was last looked at and written."""

    key: SessionKey
    checked: float
    touched: float | None = None
    pending: PendingUpdate | None = None


class DirectoryCache:
    """The rows that were looked up within the last `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        # The database's NAME as a row was remembered; tests give an alias another.
        self.database_name: Any = None
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = new_lock()
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether another process remembered, of which this one is a fork."""
        return os.getpid() != self._pid

    def is_known(self, key: SessionKey) -> bool:
        """Return whether the key's row was looked at a short while ago."""
        with self._lock:
            found = self._find(key)
            return found is not None and self._is_fresh(found.checked)

    def remember(self, key: SessionKey) -> list[tuple[SessionKey, PendingUpdate]]:
        """Note that a key has its row. Return the updates that there is no room for.

        When the row was last written stays known.
        """
        evicted = []
        with self._lock:
            found = self._find(key)
            if found is None:
                self._entries.pop(key.session_id, None)
                found = _Entry(key.fenced(None), 0)
                self._entries[key.session_id] = found
            found.checked = time.monotonic()
            self._entries.move_to_end(key.session_id)
            while len(self._entries) > REMEMBERED:
                _, old = self._entries.popitem(last=False)
                if old.pending is not None:
                    evicted.append((old.key, old.pending))
        return evicted

    def forget(self, key: SessionKey) -> None:
        """Forget a row, so that the next use looks it up again."""
        with self._lock:
            if self._find(key) is not None:
                del self._entries[key.session_id]

    def submit(self, key: SessionKey, update: PendingUpdate) -> PendingUpdate | None:
        """Return what is to be written now; None puts it off until it is due."""
        with self._lock:
            found = self._find(key)
            if found is None:
                return update
            update = found.pending.then(update) if found.pending else update
            if found.touched is not None and self._is_fresh(found.touched):
                found.pending = update
                return None
            found.touched, found.pending = time.monotonic(), None
            return update

    def put_off(self, key: SessionKey, update: PendingUpdate) -> None:
        """Keep what could not be written for the next time."""
        with self._lock:
            if (found := self._find(key)) is not None:
                found.touched = None
                later = found.pending
                found.pending = update if later is None else update.then(later)

    def take(self, key: SessionKey) -> PendingUpdate | None:
        """Take what was put off for a key."""
        with self._lock:
            found = self._find(key)
            if found is None or found.pending is None:
                return None
            update, found.pending = found.pending, None
            found.touched = time.monotonic()
            return update

    def take_all(self) -> list[tuple[SessionKey, PendingUpdate]]:
        """Forget everything. Return what was put off."""
        with self._lock:
            entries, self._entries = self._entries, OrderedDict()
        return [(each.key, each.pending) for each in entries.values() if each.pending]

    def _find(self, key: SessionKey) -> _Entry | None:
        found = self._entries.get(key.session_id)
        return found if found and found.key.user_id == key.user_id else None

    def _is_fresh(self, moment: float) -> bool:
        return time.monotonic() - moment < self.interval
