"""Remove histories for the admin and the commands, beside those who write.

Who asks is trusted: a row says whose session it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from django.db import DatabaseError, connections, transaction

from agent_sessions import approvals
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.engine import Engine
from agent_sessions.backends.database.pace import Pace
from agent_sessions.backends.database.removal import (
    BATCH_SIZE,
    batches,
    count_removed,
    finish,
    take_out,
)
from agent_sessions.backends.database.trimming import count_older, trim_history
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.backends.wrapping import innermost, removing
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidBackend,
    InvalidBranch,
    SessionDoesNotExist,
)
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession
from agent_sessions.retention.pending import COMMIT_SECONDS, is_cleared
from agent_sessions.retention.selection import Selection, databases

# How many items a session had; None where it has changed; why it was left.
Outcome = int | AgentSessionError | None


class Spared(AgentSessionError):
    """A session was left as it is; the message says why."""


@dataclass(frozen=True, slots=True)
class Removal:
    """How sessions are removed.

    `delete` takes their rows too, `waiting` those that wait for an approval, `running`
    those with an active run. `keep_turns` leaves so many turns of each. `still` says
    which are meant; it is asked again once a session is held: somebody may have used
    it meanwhile, or another process may have been faster.
    """

    delete: bool = False
    waiting: bool = False
    running: bool = False
    keep_turns: int = 0
    still: Selection = Selection()  # noqa: RUF009 - it is frozen
    batch_size: int = BATCH_SIZE
    # Returns why a session stays, "" where it may go, in place of what is said above.
    why_kept: Callable[[AgentSession], str] | None = None

    def guard(self, row: AgentSession) -> None:
        """Check that a session may be removed, as its row has just been read.

        Raises Spared, and SessionDoesNotExist where it is no longer meant.
        """
        if not self.still.among(str(row._state.db), [row.pk]).exists():
            raise SessionDoesNotExist(row.session_id)
        if reason := self.why_spared(row):
            raise Spared(reason)

    def why_spared(self, row: AgentSession) -> str:
        """Return why a session is left; "" where nothing speaks for it."""
        if self.why_kept is not None:
            return self.why_kept(row)
        if not self.running and holds_a_run(row):
            return f"run {row.run_id} is active"
        if not self.waiting and _is_waiting(row):
            return "it waits for an approval"
        return ""


def remove_all(
    rows: Iterable[AgentSession], how: Removal
) -> Iterator[tuple[AgentSession, Outcome]]:
    """Remove the items of sessions, and say of each what became of it.

    Short histories go together. Nobody finds what was removed from then on;
    finish_removals() deletes what is left of long ones.
    """
    for batch, pace in _batches(rows, how):
        try:
            found = _remove(batch, how, pace)
        except AgentSessionError as exc:
            if len(batch) > 1:
                # One of them can't be removed; the others can.
                for row in batch:
                    yield from remove_all([row], how)
                continue
            found = {batch[0].pk: exc}
        except DatabaseError:
            raise
        except Exception as exc:
            # A store of somebody else's may raise anything, and quote contents in it.
            error = AgentSessionError(f"The store raised {type(exc).__name__}.")
            found = {batch[0].pk: error}
        for row in batch:
            yield row, found.get(row.pk)


def foresee(row: AgentSession, how: Removal) -> Outcome:
    """Return what remove_all() would say of a session, and write nothing."""
    if reason := how.why_spared(row):
        return Spared(reason)
    try:
        store_of(row)
        if not how.keep_turns:
            return row.item_count
        return _trim(row, how, count_older)
    except AgentSessionError as exc:
        return exc


def remove(row: AgentSession, how: Removal) -> int | None:
    """Remove a session's items, as remove_all() does.

    Return how many there were, None where it has changed. Raises Spared, and what the
    store raises, which leaves the row.
    """
    pace = Pace(str(row._state.db), how.batch_size)
    found = _remove([row], how, pace).get(row.pk)
    if isinstance(found, AgentSessionError):
        raise found
    return found


def unfinished_items() -> int:
    """Return how many items were removed earlier and are still to be deleted."""
    return sum(map(count_removed, databases()))


def finish_removals(
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
    seconds: float = float("inf"),
) -> int:
    """Delete what was removed, also in earlier calls; return how many items.

    What runs have told goes too, where no process has removed it.
    """
    for using in databases():
        run_rows.remove_old_events(using)
    stores = [sessions.database(using).in_database for using in databases()]
    until = time.monotonic() + seconds
    return sum(
        finish(store.engine, batch_size, progress, until) for store in stores if store
    )


def finish_later(sender: type[Any] | None = None, *, using: str, **kwargs: Any) -> None:
    """Delete what is removed in a transaction once it is committed; no commit fails.

    A commit takes some seconds for it at most; the next command goes on. It is a
    receiver too: a deleted user's sessions are only taken out of sight.
    """
    # Once for all users who are deleted in a transaction.
    if not any(entry[1] is _finish for entry in connections[using].run_on_commit):
        transaction.on_commit(_finish, using=using, robust=True)


def store_of(row: AgentSession) -> tuple[BaseSessionBackend, SessionKey]:
    """Return the backend and key of a row. Raises InvalidBackend.

    Raises AgentSessionError if the row is in another database than its backend's, which
    would find what has the same key in its own.
    """
    backend = sessions[row.backend]
    using = backend.directory.using
    if row._state.db != using:
        raise AgentSessionError(
            f"Its row is in the database {row._state.db!r}, but the alias "
            f"{row.backend!r} has its sessions in the database {using!r} now. Delete "
            "rows that a move has left behind by yourself."
        )
    return backend, SessionKey(row.session_id, row.user_id)


def _is_waiting(row: AgentSession) -> bool:
    """Return whether an approval of the session can still be given."""
    if row.state != AgentSession.State.WAITING:
        return False
    try:
        return approvals.pending(*store_of(row), row.pk) is not None
    except AgentSessionError:
        # Its key is missing, or its alias: nobody can tell.
        return True


# -- inside ----------------------------------------------------------------------------


def _trim(
    row: AgentSession, how: Removal, act: Callable[[Engine, SessionKey, int], int]
) -> int | None:
    """Do something to all but the last turns of a session, and of each branch."""
    backend, key = store_of(row)
    if (rows := backend.in_database) is None:
        raise Spared(f"{type(backend).__name__} can't remove single turns")
    try:
        return act(rows.engine, key, how.keep_turns)
    except SessionDoesNotExist:
        return None
    except InvalidBranch as exc:
        raise Spared(str(exc).rstrip(".")) from exc


def _finish() -> None:
    finish_removals(seconds=COMMIT_SECONDS)


def _plain_store(backend: BaseSessionBackend) -> DatabaseBackend | None:
    """Return what holds a backend's items where that is the database's own backend.

    A subclass with a clear() of its own knows better what else is to be done.
    """
    store = innermost(backend).in_database
    is_plain = store is not None and type(store).clear is DatabaseBackend.clear
    return store if is_plain else None


def _batches(
    rows: Iterable[AgentSession], how: Removal
) -> Iterator[tuple[list[AgentSession], Pace]]:
    """Return sessions that are removed in one transaction: short ones of one backend."""
    paces: dict[str, Pace] = {}

    def kind(row: AgentSession) -> tuple[object, str]:
        with suppress(InvalidBackend):
            backend = sessions[row.backend]
            if _plain_store(backend) is backend and not how.keep_turns:
                return row.backend, using(row)
        return row.pk, using(row)

    def using(row: AgentSession) -> str:
        return str(row._state.db)

    for (_, name), group in groupby(rows, kind):
        pace = paces.setdefault(name, Pace(name, how.batch_size))
        for batch in batches(group, pace):
            yield batch, pace


def _remove(batch: list[AgentSession], how: Removal, pace: Pace) -> dict[int, Outcome]:
    """Remove sessions of one backend. Raises what their store raises."""
    backend, key = store_of(batch[0])
    if how.keep_turns:
        act = partial(trim_history, guard=how.guard, batch_size=how.batch_size)
        return {batch[0].pk: _trim(batch[0], how, act)}
    found: dict[int, Outcome] = {}

    def may_go(row: AgentSession) -> bool:
        if reason := how.why_spared(row):
            found[row.pk] = Spared(reason)
        else:
            found[row.pk] = row.item_count
        return not reason

    using, pks = str(batch[0]._state.db), [row.pk for row in batch]
    rows = how.still.among(using, pks)
    if (store := _plain_store(backend)) is not None:
        with nullcontext() if store is backend else removing(backend, key):
            take_out(store.engine, rows, may_go, delete=how.delete, pace=pace)
            outcome = found.get(pks[0])
            if store is not backend and not isinstance(outcome, int):
                # The session's key stays too.
                raise outcome or SessionDoesNotExist(key.session_id)
        pace.rest()
    elif (row := rows.first()) is not None and may_go(row):
        found[row.pk] = _remove_outside(backend, key, row, delete=how.delete)
    return found


def _remove_outside(
    backend: BaseSessionBackend, key: SessionKey, row: AgentSession, *, delete: bool
) -> int:
    """Clear a history in its store, then delete its row, which is all that is known."""
    if not delete:
        return backend.clear(key)
    # No transaction is held while another store is asked: SQLite has one writer.
    keeps_outside = innermost(backend).keeps_outside
    with nullcontext() if keeps_outside else transaction.atomic(row._state.db):
        count = backend.clear(key)
        is_cleared(row).delete(using=row._state.db)
    return count
