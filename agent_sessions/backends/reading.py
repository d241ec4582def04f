"""Read whole histories a page at a time, and where they end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.wrapping import innermost
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import StoredItem
from agent_sessions.times import moment

logger = logging.getLogger("agent_sessions.backends")


def read_history(
    backend: BaseSessionBackend, key: SessionKey, *, after: int = 0
) -> Iterator[StoredItem]:
    """Read what lies after a position, oldest first.

    Raises EncryptionError where an item needs an unknown key, or nothing opens. A copy
    of an envelope that was read before has no item.
    """
    seen: set[str] = set()
    for page in pages(backend, key, after=after):
        page.assert_open()
        for stored in page.items:
            if stored.envelope_id in seen:
                yield replace(stored, item=None, raw="", is_closed=True)
                continue
            if stored.envelope_id:
                seen.add(stored.envelope_id)
            yield stored


def pages(
    backend: BaseSessionBackend, key: SessionKey, *, after: int = 0, size: int = 500
) -> Iterator[Page]:
    """Read what lies after a position page by page, oldest first."""
    while True:
        page = backend.page(key, after=after, limit=size)
        yield page
        if not page.items or not page.has_later:
            return
        after = page.items[-1].position


def place_of(stored: StoredItem) -> tuple[int, str]:
    """Return an item's position and time, which tells it from others at the position.

    Without a time of its own the time is empty.
    """
    return stored.position, moment(stored.created_at) if stored.is_timed else ""


def find_head(backend: BaseSessionBackend, key: SessionKey) -> int:
    """Return the position of the newest item, or 0."""
    return _last(innermost(backend).page(key, limit=1))


async def afind_head(backend: BaseSessionBackend, key: SessionKey) -> int:
    """See find_head()."""
    return _last(await innermost(backend).apage(key, limit=1))


async def find_newest(
    backend: BaseSessionBackend, key: SessionKey
) -> StoredItem | None:
    """Find a history's newest item, to say where a run's items lie.

    A store that fails then doesn't fail the run, which may have ended well.
    """
    try:
        return next(iter((await backend.apage(key, limit=1)).items), None)
    except AgentSessionError as exc:
        _log(backend, exc)
        return None


def find_newest_sync(backend: BaseSessionBackend, key: SessionKey) -> StoredItem | None:
    """See find_newest()."""
    try:
        return next(iter(backend.page(key, limit=1).items), None)
    except AgentSessionError as exc:
        _log(backend, exc)
        return None


def _last(page: Page) -> int:
    return page.items[-1].position if page.items else 0


def _log(backend: BaseSessionBackend, exc: Exception) -> None:
    logger.warning(
        "A run's place in a history of %r is not known (%s)",
        backend.alias,
        type(exc).__name__,
    )
