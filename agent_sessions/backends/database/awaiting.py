"""A turn's read and append without a thread, where the database can be awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError, connections
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.prepared import rows_of
from agent_sessions.backends.database.statements import Own, Text, own_rows
from agent_sessions.items import Item, decode_all

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from agent_sessions.backends.database.backend import DatabaseBackend

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100


async def read(
    backend: DatabaseBackend, key: SessionKey, limit: int | None
) -> tuple[list[Item] | None, Own | None]:
    """Read the newest items; None, and what a thread may go on from, where it has to."""
    statements = _statements(backend)
    if statements is None or limit == 0:
        return None, None
    statement = statements.latest_statement(key, limit, connections[backend.using])
    result = await _execute(backend, statement, writes=False)
    if result is None:
        return None, None
    if result.ntuples > MANY:
        return None, await backend.threads.run(_own, result)
    own = _own(result)
    texts = await _shown(backend, statements, own, limit)
    items = None if texts is None else decode_all(reversed(texts))
    # Unreadable rows don't count: a thread looks further back.
    is_all = items is not None and texts is not None and len(items) == len(texts)
    return (items if is_all else None), own


async def _shown(
    backend: DatabaseBackend,
    statements: PostgreSQLStatements,
    own: Own,
    limit: int | None,
) -> list[Text] | None:
    """Read what a branch shows beside its own rows; None where a thread has to."""
    if own.is_all(limit):
        return own.texts
    ancestors = backend.lineages.ancestors(own.branch_id)
    if not ancestors:
        return None if ancestors is None else own.texts
    if limit is None:
        return None
    statement = statements.inherited_statement(ancestors, limit)
    result = await _execute(backend, statement, writes=False)
    if result is None:
        return None
    return [*own.texts, *(row[0] for row in rows_of(result))][:limit]


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
