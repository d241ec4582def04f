"""A turn's read and append without a thread, where the database can be awaited."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.answers import Own, Text, own_rows, read_lineage
from agent_sessions.backends.database.appending import Append
from agent_sessions.backends.database.direct import is_watched
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.prepared import rows_of
from agent_sessions.backends.database.statements import Statements
from agent_sessions.items import Decode, Item

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from agent_sessions.backends.database.backend import DatabaseBackend

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100

# Executes a statement that reads; None where a thread has to.
_Ask = Callable[[str, Sequence[Any]], Awaitable[Sequence[Sequence[Any]] | None]]


async def read(
    backend: DatabaseBackend, key: SessionKey, limit: int | None, decode: Decode
) -> tuple[list[Item] | None, Own | None]:
    """Read the newest items, or None and the rows from which a thread goes on."""
    connection = connections[backend.using]
    ask = None if limit == 0 else _asking(backend, key, connection)
    if ask is None:
        return None, None
    statements = backend.statements(connection)
    rows = await ask(*statements.latest_statement(key, limit, connection))
    if rows is None:
        return None, None
    own = own_rows(rows)
    if len(rows) > MANY:
        return None, own
    texts = await _shown(backend, ask, (key, limit), own)
    items = None if texts is None else decode(reversed(texts))
    # Unreadable rows don't count: a thread looks further back.
    is_all = items is not None and texts is not None and len(items) == len(texts)
    return (items if is_all else None), own


async def _shown(
    backend: DatabaseBackend,
    ask: _Ask,
    asked: tuple[SessionKey, int | None],
    own: Own,
) -> list[Text] | None:
    """Read what a branch shows beside its own rows; None where a thread has to."""
    key, limit = asked
    if own.is_all(limit):
        return own.texts
    if own.branch_id is None or limit is None:
        return None
    connection = connections[backend.using]
    statements = backend.statements(connection)
    family = await ask(*statements.lineage_statement(key, connection))
    segments = read_lineage(family or ())
    if not segments or segments[0].branch_id != own.branch_id:
        return None
    rows = await ask(*statements.inherited_statement(segments[1:], limit))
    if rows is None:
        return None
    return [*own.texts, *(row[0] for row in rows)][:limit]


def _asking(
    backend: DatabaseBackend, key: SessionKey, connection: BaseDatabaseWrapper
) -> _Ask | None:
    """Choose how to read without a thread; None where that can't be."""
    short = backend.short_reads
    if short is None:
        return None if _statements(backend) is None else partial(_answer, backend)
    if is_watched(connection) or not short.threads.serves_caller():
        return None

    async def ask(sql: str, params: Sequence[Any]) -> list[tuple[Any, ...]] | None:
        return short.rows(key, sql, params)

    return ask


async def _answer(
    backend: DatabaseBackend, sql: str, params: Sequence[Any]
) -> list[list[Any]] | None:
    result = await _execute(backend, (sql, params), writes=False)
    if result is None:
        return None
    if result.ntuples > MANY:
        return await backend.threads.run(rows_of, result)
    return rows_of(result)


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


def make_ready(
    statements: Statements, key: SessionKey, items: Sequence[Item]
) -> Append:
    """Encode a batch unless it is long. Raises InvalidItem."""
    batch = statements.batch(items) if len(items) <= MANY else None
    return Append(key, items, batch)


def _statements(backend: DatabaseBackend) -> PostgreSQLStatements | None:
    """Return what awaits a backend's statements, on a connection of its own."""
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
        raise backend.storage_error(exc) from None
