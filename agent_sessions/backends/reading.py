"""Read whole histories, a page at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.items import StoredItem

_PAGE = 200


def read_history(
    backend: BaseSessionBackend, key: SessionKey, *, after: int = 0
) -> Iterator[StoredItem]:
    """Read what lies after a position, oldest first.

    Raises EncryptionError where an item needs an unknown key, or nothing opens. A copy
    of an envelope that was read before has no item.
    """
    seen: set[str] = set()
    while True:
        page = backend.page(key, after=after, limit=_PAGE)
        backend.assert_open(page)
        for stored in page.items:
            if stored.envelope_id in seen:
                yield replace(stored, item=None, raw="", is_closed=True)
                continue
            if stored.envelope_id:
                seen.add(stored.envelope_id)
            yield stored
        if not page.items or not page.has_later:
            return
        after = page.items[-1].position
