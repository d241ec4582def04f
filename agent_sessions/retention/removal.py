"""Remove histories for the commands: in small steps, beside those who write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.removal import (
    BATCH_SIZE,
    remove_history,
    sweep,
    unswept,
)
from agent_sessions.backends.database.trimming import count_older, trim_history
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.backends.wrapping import innermost, removing
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidBranch,
    SessionDoesNotExist,
)
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession
from agent_sessions.retention.rows import clear, delete, is_waiting, store_of


class Spared(AgentSessionError):
    """A session was left as it is; the message says why."""


@dataclass(frozen=True, slots=True)
class Removal:
    """How sessions are removed.

    `delete` takes their rows too, `waiting` those that wait for an approval. `still`
    is asked again once the session is held: somebody may have used it meanwhile, or
    another process may have been faster.
    """

    delete: bool = False
    waiting: bool = False
    still: Callable[[AgentSession], bool] | None = None
    batch_size: int = BATCH_SIZE

    def guard(self, row: AgentSession) -> None:
        """Pass where a session may be removed, as its row has just been read.

        Raises Spared, and SessionDoesNotExist where it is no longer meant.
        """
        if self.still is not None and not self.still(row):
            raise SessionDoesNotExist(row.session_id)
        if reason := why_spared(row, waiting=self.waiting):
            raise Spared(reason)


def why_spared(row: AgentSession, *, waiting: bool = False) -> str:
    """Return why a session is to be left as it is; "" where nothing speaks for it."""
    if holds_a_run(row):
        return f"run {row.run_id} is active"
    if not waiting and is_waiting(row):
        return "it waits for an approval"
    return ""


def remove(row: AgentSession, how: Removal) -> int | None:
    """Remove a session's items; tell how many there were, None where it has changed.

    Nobody finds them from then on; finish_removals() deletes what is left of long
    histories. Raises Spared, and what the store raises, which leaves the row.
    """
    backend, key = store_of(row)
    try:
        store = innermost(backend).in_database
        # A subclass with a clear() of its own knows better what else is to be done.
        if store is not None and type(store).clear is DatabaseBackend.clear:
            with removing(backend, key):
                return remove_history(
                    store.engine,
                    key,
                    delete=how.delete,
                    guard=how.guard,
                    batch_size=how.batch_size,
                )
        fresh = backend.directory.rows(key).first()
        if fresh is None:
            return None
        how.guard(fresh)
        return delete(fresh) if how.delete else clear(fresh)
    except SessionDoesNotExist:
        return None


def trim(row: AgentSession, keep: int, how: Removal | None = None) -> int | None:
    """Remove all but the last `keep` turns of a session, and of each of its branches.

    Tells how many items, None where the session has changed. Raises Spared, also where
    the store can't remove single turns, and what the store raises.
    """
    how = how or Removal()
    backend, key = store_of(row)
    if (rows := backend.in_database) is None:
        raise Spared(f"{type(backend).__name__} can't remove single turns")
    try:
        return trim_history(
            rows.engine, key, keep, guard=how.guard, batch_size=how.batch_size
        )
    except SessionDoesNotExist:
        return None
    except InvalidBranch as exc:
        raise Spared(str(exc).rstrip(".")) from exc


def count_trimmed(row: AgentSession, keep: int) -> int:
    """Return how many items trim() would remove. Raises what it does."""
    backend, key = store_of(row)
    if (rows := backend.in_database) is None:
        raise Spared(f"{type(backend).__name__} can't remove single turns")
    try:
        return count_older(rows.engine, key, keep)
    except InvalidBranch as exc:
        raise Spared(str(exc).rstrip(".")) from exc


def unfinished_items() -> int:
    """Return how many items were removed earlier and are still to be deleted."""
    return sum(unswept(using) for using in _databases())


def finish_removals(
    *, batch_size: int = BATCH_SIZE, progress: Callable[[int], None] | None = None
) -> int:
    """Delete what remove() has taken out, also in earlier calls; tell how many items."""
    return sum(
        sweep(backend.engine, batch_size=batch_size, progress=progress)
        for backend in _databases().values()
    )


def _databases() -> dict[str, Any]:
    """Return a backend for each Django database that may have histories."""
    found = [sessions.database(), *(sessions[alias] for alias in sessions)]
    names = {each.directory.using for each in found}
    return {name: sessions.database(name) for name in sorted(names)}
