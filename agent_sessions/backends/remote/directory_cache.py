"""What a process remembers of sessions' rows, so that it need not ask at each use."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass

from agent_sessions.backends.base import SessionKey
from agent_sessions.concurrency.forks import new_lock

# How many sessions a process remembers.
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class News:
    """What a session's row is to say: how many items, and the title if it has none."""

    count: int | None = None
    title: str = ""

    def then(self, later: News) -> News:
        """Return what is to be said after both."""
        count = self.count if later.count is None else later.count
        return News(count, self.title or later.title)


@dataclass(slots=True)
class _Admission:
    """That a key's row was found or made, and when it was last written."""

    key: SessionKey
    checked: float
    touched: float | None = None
    # What was put off.
    news: News | None = None


class Admissions:
    """The sessions that were looked up within the last `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._known: OrderedDict[str, _Admission] = OrderedDict()
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

    def remember(self, key: SessionKey) -> list[tuple[SessionKey, News]]:
        """Note that a key's row is there; give what must be written for lack of room.

        What is known of the row's last writing stays known.
        """
        pushed = []
        with self._lock:
            found = self._find(key)
            if found is None:
                self._known.pop(key.session_id, None)
                found = _Admission(key.fenced(None), 0)
                self._known[key.session_id] = found
            found.checked = time.monotonic()
            self._known.move_to_end(key.session_id)
            while len(self._known) > REMEMBERED:
                _, old = self._known.popitem(last=False)
                if old.news is not None:
                    pushed.append((old.key, old.news))
        return pushed

    def forget(self, key: SessionKey) -> None:
        """Have the row looked up again at the next use."""
        with self._lock:
            if self._find(key) is not None:
                del self._known[key.session_id]

    def tell(self, key: SessionKey, news: News) -> News | None:
        """Take what the row is to say now, or put it off until it was long enough."""
        with self._lock:
            found = self._find(key)
            if found is None:
                return news
            news = news if found.news is None else found.news.then(news)
            if found.touched is not None and self._is_fresh(found.touched):
                found.news = news
                return None
            found.touched, found.news = time.monotonic(), None
            return news

    def put_off(self, key: SessionKey, news: News) -> None:
        """Keep what could not be written for the next time."""
        with self._lock:
            if (found := self._find(key)) is not None:
                found.touched = None
                found.news = news if found.news is None else news.then(found.news)

    def take(self, key: SessionKey) -> News | None:
        """Take what was put off for a key."""
        with self._lock:
            found = self._find(key)
            if found is None or found.news is None:
                return None
            news, found.news = found.news, None
            found.touched = time.monotonic()
            return news

    def take_all(self) -> list[tuple[SessionKey, News]]:
        """Forget everything; give what was put off."""
        with self._lock:
            known, self._known = self._known, OrderedDict()
        return [(each.key, each.news) for each in known.values() if each.news]

    def _find(self, key: SessionKey) -> _Admission | None:
        found = self._known.get(key.session_id)
        return found if found and found.key.user_id == key.user_id else None

    def _is_fresh(self, moment: float) -> bool:
        return time.monotonic() - moment < self.interval
