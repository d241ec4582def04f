"""What a process remembers of encrypted sessions: derived keys, opened envelopes.

Each turn reads the same items again, and opening fifty of them takes longer than
reading them from a database.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

# Sessions of which anything is remembered.
_SESSIONS = 1_024
# What an entry takes beside its texts, about.
_OVERHEAD = 300


class Remembered:
    """What is remembered of one session."""

    def __init__(self, max_bytes: int) -> None:
        self.ciphers: dict[str, Fernet] = {}
        self.size = 0
        self._max = max_bytes
        self._opened: dict[str, tuple[str, bytes, int]] = {}

    def __repr__(self) -> str:
        return f"<Remembered {len(self._opened)} items>"

    def find(self, envelope_id: str, payload: str) -> tuple[bytes, int] | None:
        """Find what an envelope held, if it is still the same to the last letter."""
        found = self._opened.get(envelope_id)
        if found is None or found[0] != payload:
            return None
        return found[1], found[2]

    def keep(self, envelope_id: str, payload: str, data: bytes, written: int) -> int:
        """Remember what an envelope holds; tell by how much memory grew."""
        before = self.size
        more = len(payload) + len(data) + _OVERHEAD
        if more > self._max:
            return 0
        self._drop(envelope_id)
        while self.size + more > self._max:
            self._drop(next(iter(self._opened)))
        self._opened[envelope_id] = payload, data, written
        self.size += more
        return self.size - before

    def _drop(self, envelope_id: str) -> None:
        if (found := self._opened.pop(envelope_id, None)) is not None:
            self.size -= len(found[0]) + len(found[1]) + _OVERHEAD


class Memory:
    """What is remembered of sessions, the longest unused forgotten first.

    `max_bytes` bounds the opened envelopes, of which one session gets a quarter at
    most; 0 remembers none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._size = 0
        self._sessions: OrderedDict[bytes, Remembered] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Memory {len(self._sessions)} sessions>"

    def ciphers(self, context: bytes) -> dict[str, Fernet]:
        """Give the derived keys of a session, to be added to."""
        with self._lock:
            return self._of(context).ciphers

    def find(
        self, context: bytes, envelope: dict[str, str]
    ) -> tuple[bytes, int] | None:
        """See Remembered.find()."""
        if not self.max_bytes:
            return None
        with self._lock:
            return self._of(context).find(envelope["id"], envelope["payload"])

    def keep(
        self, context: bytes, envelope: dict[str, str], data: bytes, written: int
    ) -> None:
        """See Remembered.keep()."""
        if not self.max_bytes:
            return
        with self._lock:
            session = self._of(context)
            self._size += session.keep(
                envelope["id"], envelope["payload"], data, written
            )
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
