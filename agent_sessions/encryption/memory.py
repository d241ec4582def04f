"""What a process remembers of encrypted sessions: derived keys, opened envelopes.

Each turn reads the same items again, and opening fifty of them takes longer than
reading them from a database.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_sessions.forks import new_lock

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

# Sessions of which anything is remembered.
_SESSIONS = 1_024
# What an entry takes beside its texts, about.
_OVERHEAD = 600


class Known(NamedTuple):
    """An envelope that was opened: what it held, packed, and when it was written."""

    envelope: dict[str, Any]
    packed: bytes
    written: int


class Remembered:
    """What is remembered of one session: derived keys, opened envelopes by their id."""

    def __init__(self, max_bytes: int) -> None:
        self.ciphers: dict[str, Fernet] = {}
        self.opened: dict[str, Known] = {}
        self.size = 0
        self._max = max_bytes

    def __repr__(self) -> str:
        return f"<Remembered {len(self.opened)} items>"

    def keep(self, envelope_id: str, known: Known) -> int:
        """Remember what an envelope held; tell by how much memory grew."""
        before, more = self.size, _size(known)
        if more > self._max:
            return 0
        self._drop(envelope_id)
        while self.size + more > self._max:
            self._drop(next(iter(self.opened)))
        self.opened[envelope_id] = known
        self.size += more
        return self.size - before

    def _drop(self, envelope_id: str) -> None:
        if (found := self.opened.pop(envelope_id, None)) is not None:
            self.size -= _size(found)


class Memory:
    """What is remembered of sessions, the longest unused forgotten first.

    `max_bytes` bounds the opened envelopes, of which one session gets a quarter at
    most; 0 remembers none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = new_lock()
        self._size = 0
        self._sessions: OrderedDict[bytes, Remembered] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Memory {len(self._sessions)} sessions>"

    def of(self, context: bytes) -> Remembered:
        """Give what is remembered of a session."""
        with self._lock:
            return self._of(context)

    def keep(self, context: bytes, envelope_id: str, known: Known) -> None:
        """See Remembered.keep()."""
        if not self.max_bytes:
            return
        with self._lock:
            self._size += self._of(context).keep(envelope_id, known)
            while self._size > self.max_bytes:
                self._size -= self._sessions.popitem(last=False)[1].size

    def forget(self, context: bytes) -> None:
        """Forget a session: it was cleared."""
        with self._lock:
            if (found := self._sessions.pop(context, None)) is not None:
                self._size -= found.size

    def _of(self, context: bytes) -> Remembered:
        found = self._sessions.get(context)
        if found is None:
            found = self._sessions[context] = Remembered(self.max_bytes // 4)
            while len(self._sessions) > _SESSIONS:
                self._size -= self._sessions.popitem(last=False)[1].size
        else:
            self._sessions.move_to_end(context)
        return found


def _size(known: Known) -> int:
    return len(known.envelope["payload"]) + len(known.packed) + _OVERHEAD
