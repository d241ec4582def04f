"""A turn's read and append without a thread, where the database can be awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError, connections
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.prepared import rows_of
from agent_sessions.backends.database.statements import Own, own_rows
from agent_sessions.items import Item

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from agent_sessions.backends.database.backend import DatabaseBackend

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100


async def read(
    backend: DatabaseBackend, key: SessionKey, limit: int | None
) -> Own | None:
    """Read the newest rows of the branch itself; None where a thread has to."""
    statements = _statements(backend)
    if statements is None:
        return None
    statement = statements.latest_statement(key, limit, connections[backend.using])
    result = await _execute(backend, statement, writes=False)
    if result is None:
        return None
    if result.ntuples > MANY:
        return await backend.threads.run(_own, result)
    return _own(result)


async def write(
    backend: DatabaseBackend, key: SessionKey, items: Sequence[Item]
) -> bool:
    """Store a batch; False, with nothing written, where a thread has to."""
    statements = _statements(backend)
    if statements is None or len(items) > MANY:
        return False
    statement = statements.append_statement(
        key, statements.batch(items), timezone.now(), connections[backend.using]
    )
    result = await _execute(backend, statement, writes=True)
    return result is not None and bool(result.command_tuples)


def _statements(backend: DatabaseBackend) -> PostgreSQLStatements | None:
    """Give the statements of a backend that can be awaited, on a connection of its own."""
    connection = connections[backend.using]
    if (
        backend.wires is None
        or not backend.wires.prepared.may_prepare_on(connection)
        or not backend.threads.serves_caller()
    ):
        return None
    statements = backend.statements(connection)
    return statements if isinstance(statements, PostgreSQLStatements) else None


async def _execute(
    backend: DatabaseBackend, statement: tuple[str, Sequence[Any]], *, writes: bool
) -> PGresult | None:
    if backend.wires is None:
        return None
    try:
        return await backend.wires.execute(*statement, writes=writes)
    except (DatabaseError, InterfaceError) as exc:
        raise backend.storage_error(exc) from exc


def _own(result: PGresult) -> Own:
    return own_rows(rows_of(result))
