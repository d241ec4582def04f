"""What a process remembers of opened envelopes, for a minute at most.

Each turn reads the same items again, and opening fifty of them takes longer than
reading them from a database. No key is kept here.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Container, Iterable
from typing import Any, NamedTuple
from weakref import WeakSet

from agent_sessions.encryption.envelopes import (
    ENVELOPE_KEYS,
    ID_PLACE,
    TOKEN_PLACE,
    VERSION,
    has_whole_numbers,
    row_of,
)
from agent_sessions.items import decode_all

# Seconds for which an entry is kept, and between two times that old ones are dropped.
_AGE = 30.0
# Lone surrogates, which are no text, don't become the same bytes.
_ANY = "surrogatepass"
# What an entry takes beside its texts, about.
_OVERHEAD = 800


class Known(NamedTuple):
    """An envelope that was opened: how stores have it, and what it held.

    It was `written` at that time in Unix seconds, and is known `since`.
    """

    envelope_id: str
    key_id: str
    row: bytes
    text: bytes
    written: int
    since: float


class Memory:
    """The envelopes that were opened a short while ago, the oldest dropped first.

    An entry spares opening the very envelope that a row has just given, and is found
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
        # By contexts and the bytes of ids.
        self._entries: OrderedDict[tuple[bytes, bytes], Known] = OrderedDict()

    def read(self, context: bytes, rows: Iterable[str | bytes]) -> list[Any]:
        """Read a session's rows as decode_all() does, for find_each().

        Those of known envelopes stay unread: what is known takes their place.
        """
        entries = self._entries
        if not entries:
            return decode_all(rows)
        found: list[Any] = []
        for given in rows:
            row = given if isinstance(given, bytes) else given.encode(errors=_ANY)
            known = entries.get((context, row[ID_PLACE]))
            # To the last letter: what is the same was found authentic before.
            if known is not None and known.row == row:
                found.append(known)
            else:
                found += decode_all((row,))
        return found

    def find_each(
        self, context: bytes, envelopes: Iterable[Any], key_ids: Container[Any]
    ) -> list[Known | None]:
        """Find what envelopes of a session held, as far as their keys are there.

        One is found by its like, the same to the letter, if read() hasn't found it.
        """
        found: list[Known | None] = []
        for each in envelopes:
            known = each if type(each) is Known else self._find(context, each)
            is_there = known is not None and known.key_id in key_ids
            found.append(known if is_there else None)
        return found

    def _find(self, context: bytes, envelope: Any) -> Known | None:
        try:
            known = self._entries[context, envelope["id"].encode()]
            token = envelope["payload"].encode()
            is_same = (
                known.row[TOKEN_PLACE] == token
                and known.key_id == envelope["kid"]
                and (envelope["__enc__"], envelope["v"]) == (1, VERSION)
                and has_whole_numbers(envelope)
                and len(envelope) == len(ENVELOPE_KEYS)
            )
        except (KeyError, TypeError, AttributeError, UnicodeError):
            # Not there, or it is no envelope at all.
            return None
        return known if is_same else None

    def keep(
        self, context: bytes, envelope: dict[str, Any], text: bytes, written: int
    ) -> None:
        """Remember what an envelope of a session held."""
        if not self.max_bytes:
            return
        name, row = envelope["id"], row_of(envelope)
        known = Known(name, envelope["kid"], row, text, written, time.monotonic())
        key = context, name.encode()
        size = _size(known)
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
        """Forget one envelope of a session: its item was removed."""
        with self._lock:
            self._drop((context, envelope_id.encode()))

    def forget(self, context: bytes) -> None:
        """Forget a session: it was cleared."""
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

    def _drop(self, key: tuple[bytes, bytes]) -> None:
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
    return len(known.row) + len(known.text) + _OVERHEAD
