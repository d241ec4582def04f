"""Where a history ends, where its rows don't tell: asked of the store."""

from __future__ import annotations

import logging

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import StoredItem

logger = logging.getLogger("agent_sessions.backends")


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


def _log(backend: BaseSessionBackend, exc: Exception) -> None:
    logger.warning(
        "A run's place in a history of %r is not known (%s)",
        backend.alias,
        type(exc).__name__,
    )
