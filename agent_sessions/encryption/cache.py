"""What a process remembers of opened envelopes, for a minute at most.

Each turn reads the same items again, and opening fifty of them takes longer than
reading them from a database. No key is kept here.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Container
from typing import Any, NamedTuple
from weakref import WeakSet

# Seconds for which an entry is kept, and between two times that old ones are dropped.
_AGE = 30.0
# What an entry takes beside its texts, about.
_OVERHEAD = 1000


class Known(NamedTuple):
    """What an envelope held, `written` at that time in Unix seconds."""

    envelope: dict[str, Any]
    text: bytes
    written: int
    # In monotonic time.
    since: float


class Memory:
    """The envelopes that were opened a short while ago, the oldest dropped first.

    An entry spares opening the very envelope that a store has just given, and is found
    in no other way. It goes with its session or item, when `max_bytes` are full (0
    keeps none), and after 30 to 60 seconds, whatever happened to its row elsewhere.
    """

    def __init__(self, max_bytes: int, max_age: float = _AGE) -> None:
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.reset()
        _memories.add(self)

    def __repr__(self) -> str:
        return f"<Memory {len({context for context, _ in self._entries})} sessions>"

    def reset(self) -> None:
        """Forget everything, also that a thread was about to: after a fork it isn't."""
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._size = 0
        # By contexts and the ids of envelopes.
        self._entries: OrderedDict[tuple[bytes, str], Known] = OrderedDict()

    def find(
        self, context: bytes, envelope: Any, key_ids: Container[str]
    ) -> Known | None:
        """Return what is known of an envelope of a session, if its key is there.

        It is the same to the last letter, which was found authentic before.
        """
        try:
            known = self._entries[context, envelope["id"]]
        except (KeyError, TypeError):
            # It is not there, or no envelope at all.
            return None
        is_same = (
            known.envelope == envelope
            # No other numbers that equal these.
            and type(envelope["v"]) is type(envelope["__enc__"]) is int
            and envelope["kid"] in key_ids
        )
        return known if is_same else None

    def keep(
        self, context: bytes, envelope: dict[str, Any], text: bytes, written: int
    ) -> None:
        """Remember what an envelope of a session held."""
        if not self.max_bytes:
            return
        known = Known(dict(envelope), text, written, time.monotonic())
        key, size = (context, envelope["id"]), _size(known)
        if size > self.max_bytes // 4:
            return
        with self._lock:
            self._drop(key)
            while self._size + size > self.max_bytes:
                self._drop(next(iter(self._entries)))
            self._entries[key] = known
            self._size += size
            if self._timer is None:
                self._wait()

    def drop(self, context: bytes, envelope_id: str) -> None:
        with self._lock:
            self._drop((context, envelope_id))

    def forget(self, context: bytes) -> None:
        with self._lock:
            for key in [key for key in self._entries if key[0] == context]:
                self._drop(key)

    def close(self) -> None:
        """Forget everything, and wait for nothing more."""
        with self._lock:
            self._clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wait(self) -> None:
        timer = threading.Timer(self.max_age, self._drop_old)
        timer.daemon = True
        # As the interpreter ends there are no new threads: then nothing is kept.
        self._timer = None
        try:
            timer.start()
        except RuntimeError:
            self._clear()
        else:
            self._timer = timer

    def _clear(self) -> None:
        self._entries.clear()
        self._size = 0

    def _drop_old(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # closed meanwhile
            self._timer = None
            oldest = time.monotonic() - self.max_age
            while self._entries:
                key, known = next(iter(self._entries.items()))
                if known.since > oldest:
                    self._wait()
                    return
                self._drop(key)

    def _drop(self, key: tuple[bytes, str]) -> None:
        if (found := self._entries.pop(key, None)) is not None:
            self._size -= _size(found)


_memories: WeakSet[Memory] = WeakSet()


def _reset_all() -> None:
    for memory in _memories:
        memory.reset()


if hasattr(os, "register_at_fork"):
    # A child has no thread that would drop anything, and perhaps a lock that is held.
    os.register_at_fork(after_in_child=_reset_all)


def _size(known: Known) -> int:
    return len(known.envelope["payload"]) + len(known.text) + _OVERHEAD
