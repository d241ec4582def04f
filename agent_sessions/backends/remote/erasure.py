"""What is still to be removed from a store: rows of PendingClear, one taker at a time.

No transaction is held while the store is asked. Who takes a row counts its attempt up
by compare-and-set, so another process leaves it alone until that ends or has been
silent for too long.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.db.models import Q, QuerySet

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.leases import DatabaseNow, is_silent
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.connections import choosing
from agent_sessions.exceptions import AgentSessionError, HistoryGone, StoreBusy
from agent_sessions.models import AgentSession, PendingClear

logger = logging.getLogger("agent_sessions.backends")

# An attempt that has been silent for so long was killed.
CLAIM = timedelta(minutes=2)
# Seconds for which a session waits until another process has removed what was there.
_PATIENCE = 5.0
_PAUSE = 0.05


def add_pending(using: str, row: AgentSession) -> PendingClear:
    """Write down that a session's history is to be removed from its store."""
    return PendingClear.objects.using(using).create(
        backend=row.backend,
        session_id=row.session_id,
        owner=owner_text(row.user_id),
        remote_id=row.remote_id,
    )


def owner_text(user_id: Any) -> str:
    """Return an owner as PendingClear keeps it; "" for none."""
    return "" if user_id is None else str(user_id)


def erase_pending(
    backend: BaseSessionBackend, key: SessionKey, row: PendingClear
) -> int | None:
    """Remove what a row tells of; give how many items, None where another does it.

    Raises what the store raises; the row then stays, with the error's name.
    """
    rows = PendingClear.objects.using(row._state.db).filter(pk=row.pk)
    free = Q(attempts=0) | ~Q(error_code="") | is_silent("tried_at", CLAIM)
    mine = rows.filter(attempts=row.attempts + 1)
    if not rows.filter(free, attempts=row.attempts).update(
        attempts=row.attempts + 1, tried_at=DatabaseNow(), error_code=""
    ):
        return None
    try:
        with choosing(str(row._state.db)):
            count = backend.erase(key, row.remote_id)
    except HistoryGone:
        count = 0
    except BaseException as exc:
        mine.update(error_code=type(exc).__name__[:64])
        raise
    mine.delete()
    return count


def erase_before(backend: BaseSessionBackend, key: SessionKey) -> None:
    """Remove what an earlier session of this key has left, before the key is used.

    Raises what the store raises, and StoreBusy where another process takes too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while (row := pending_of(backend, key).first()) is not None:
        if erase_pending(backend, key, row) is not None:
            continue
        if time.monotonic() > deadline:
            raise StoreBusy(
                f"What an earlier session {key.session_id!r} held is being removed by "
                "another process. Try again."
            )
        time.sleep(_PAUSE)


def enroll(backend: BaseSessionBackend, key: SessionKey) -> None:
    """Make the rows that a session's first use needs. Raises what create() does."""
    directory = backend.directory
    if innermost(backend).keeps_outside and not directory.rows(key).exists():
        erase_before(backend, key)
    directory.create(key)


def has_owner(using: str, key: SessionKey) -> bool:
    """Return whether a key's owner is still there, or never had to be.

    Databases may find out no sooner than at the end of their transaction.
    """
    owners: Any = get_user_model()._base_manager.using(using)
    return key.user_id is None or owners.filter(pk=key.user_id).exists()


def erase_now(backend: BaseSessionBackend, key: SessionKey) -> None:
    """Remove what was written to a session that has no row any more, or leave it so."""
    row = AgentSession(
        backend=backend.alias, session_id=key.session_id, user_id=key.user_id
    )
    try:
        erase_pending(backend, key, add_pending(backend.directory.using, row))
    except AgentSessionError as exc:
        logger.warning(
            "A deleted session's history is still in %r (%s)",
            backend.alias,
            type(exc).__name__,
        )


def pending_of(backend: BaseSessionBackend, key: SessionKey) -> QuerySet[PendingClear]:
    """Return what earlier sessions of this key have left."""
    return (
        PendingClear.objects.using(backend.directory.using)
        .filter(
            backend=backend.alias,
            session_id=key.session_id,
            owner=owner_text(key.user_id),
        )
        .order_by("pk")
    )
