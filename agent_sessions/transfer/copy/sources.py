"""Which histories are copied: sessions with a row, and those that a store alone has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.wrapping import innermost
from agent_sessions.models import AgentSession
from agent_sessions.retention import Selection
from agent_sessions.retention.selection import is_storable


@dataclass(frozen=True, slots=True)
class Chosen:
    """A history to copy; without a row it is one of a store that nobody owns."""

    key: SessionKey
    row: AgentSession | None = None


def find_sources(
    backend: BaseSessionBackend, *, session_ids: tuple[str, ...] = (), user: Any = None
) -> Iterator[Chosen | str]:
    """Return the chosen histories of a backend, or an id that it doesn't have.

    Without ids and user these are all, also those that only the store knows where it
    can list them.
    """
    selection = Selection(session_ids=session_ids, backends=(backend.alias,), user=user)
    if session_ids:
        rows, unknown = selection.named()
        yield from map(_of, rows)
        for session_id in unknown:
            key = SessionKey(session_id)
            # Stores refuse to look for other ids.
            is_sought = user is None and is_storable(session_id)
            has_items = is_sought and _has_items(backend, key)
            yield Chosen(key) if has_items else session_id
        return
    yield from map(_of, selection.rows())
    if user is None and backend.supports_listing:
        for session_id in list(cast("Any", backend).list_ids()):
            key = SessionKey(session_id)
            if not backend.directory.rows(key).exists() and _has_items(backend, key):
                yield Chosen(key)


def count_items(
    backend: BaseSessionBackend, *, session_ids: tuple[str, ...] = (), user: Any = None
) -> int:
    """Count the items of the chosen sessions, as far as their rows say."""
    selection = Selection(session_ids=session_ids, backends=(backend.alias,), user=user)
    return selection.totals().items


def _of(row: AgentSession) -> Chosen:
    return Chosen(SessionKey(row.session_id, row.user_id), row)


def _has_items(backend: BaseSessionBackend, key: SessionKey) -> bool:
    if backend.directory.rows(key).exists():
        return True
    return innermost(backend).keeps_outside and bool(backend.page(key, limit=1).items)
