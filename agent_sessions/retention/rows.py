"""Read, clear and delete sessions by their row."""

from __future__ import annotations

from django.db import transaction

from agent_sessions import approvals
from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.wrapping import innermost
from agent_sessions.exceptions import AgentSessionError, InvalidApproval
from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.retention.pending import is_cleared


def store_of(row: AgentSession) -> tuple[BaseSessionBackend, SessionKey]:
    """Return the backend and key of a row. Raises InvalidBackend."""
    return sessions[row.backend], SessionKey(row.session_id, row.user_id)


def read_page(
    row: AgentSession,
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int,
) -> Page:
    """Read a stretch of a session's items, oldest first."""
    backend, key = store_of(row)
    return backend.page(key, before=before, after=after, limit=limit)


def is_waiting(row: AgentSession) -> bool:
    """Return whether an approval of the session can still be given."""
    if row.state != AgentSession.State.WAITING:
        return False
    runs = AgentRun._base_manager.using(row._state.db).filter(session_id=row.pk)
    run = approvals.waiting(runs).select_related("session").order_by("-pk").first()
    if run is None:
        return False
    try:
        return not approvals.unseal(*store_of(row), run).is_over
    except InvalidApproval:
        return False
    except AgentSessionError:
        # Its key is missing, or its alias: nobody can tell.
        return True


def clear(row: AgentSession) -> int:
    """Remove all items of a session; tell how many. The row and its owner stay."""
    backend, key = store_of(row)
    return backend.clear(key)


def delete(row: AgentSession) -> int:
    """Remove a session's items, then its row; tell how many items it had.

    A store that fails leaves the row, which is all that is known of the items.
    """
    backend, key = store_of(row)
    if innermost(backend).keeps_outside:
        # No transaction is held while another store is asked: SQLite has one writer.
        count = backend.clear(key)
        is_cleared(row).delete(using=row._state.db)
        return count
    with transaction.atomic(row._state.db):
        count = backend.clear(key)
        is_cleared(row).delete(using=row._state.db)
    return count
