"""A turn's read and append without a thread, where the database can be awaited."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError
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

    from agent_sessions.backends.database.engine import Engine

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100

# Executes a statement that reads; None where a thread has to.
_Ask = Callable[[str, Sequence[Any]], Awaitable[Sequence[Sequence[Any]] | None]]


async def read(
    engine: Engine, key: SessionKey, limit: int | None, decode: Decode
) -> tuple[list[Item] | None, Own | None]:
    """Read the newest items, or None and the rows from which a thread goes on."""
    connection = engine.connection
    ask = None if limit == 0 else _asking(engine, key, connection)
    if ask is None:
        return None, None
    statements = engine.statements
    rows = await ask(*statements.latest_statement(key, limit, connection))
    if rows is None:
        return None, None
    own = own_rows(rows)
    if len(rows) > MANY:
        return None, own
    texts = await _shown(engine, ask, (key, limit), own)
    items = None if texts is None else decode(reversed(texts))
    # Unreadable rows don't count: a thread looks further back.
    is_all = items is not None and texts is not None and len(items) == len(texts)
    return (items if is_all else None), own


async def _shown(
    engine: Engine,
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
    connection = engine.connection
    statements = engine.statements
    family = await ask(*statements.lineage_statement(key, connection))
    segments = read_lineage(family or ())
    if not segments or segments[0].branch_id != own.branch_id:
        return None
    rows = await ask(*statements.inherited_statement(segments[1:], limit))
    if rows is None:
        return None
    return [*own.texts, *(row[0] for row in rows)][:limit]


def _asking(
    engine: Engine, key: SessionKey, connection: BaseDatabaseWrapper
) -> _Ask | None:
    """Choose how to read without a thread; None where that can't be."""
    short = engine.short_reads
    if short is None:
        return None if _statements(engine) is None else partial(_answer, engine)
    if is_watched(connection) or not short.threads.serves_caller():
        return None

    async def ask(sql: str, params: Sequence[Any]) -> list[tuple[Any, ...]] | None:
        return short.rows(key, sql, params)

    return ask


async def _answer(
    engine: Engine, sql: str, params: Sequence[Any]
) -> list[list[Any]] | None:
    result = await _execute(engine, (sql, params), writes=False)
    if result is None:
        return None
    if result.ntuples > MANY:
        return await engine.threads.run(rows_of, result)
    return rows_of(result)


async def write(engine: Engine, key: SessionKey, items: Sequence[Item]) -> bool:
    """Store a batch; False, with nothing written, where a thread has to."""
    statements = _statements(engine)
    if statements is None or len(items) > MANY:
        return False
    statement = statements.append_statement(
        key, statements.batch(items), timezone.now(), engine.connection
    )
    result = await _execute(engine, statement, writes=True)
    return result is not None and bool(result.command_tuples)


def make_ready(
    statements: Statements, key: SessionKey, items: Sequence[Item]
) -> Append:
    """Encode a batch unless it is long. Raises InvalidItem."""
    batch = statements.batch(items) if len(items) <= MANY else None
    return Append(key, items, batch)


def _statements(engine: Engine) -> PostgreSQLStatements | None:
    """Return what awaits a backend's statements, on a connection of its own."""
    connection = engine.connection
    if (
        engine.wires is None
        or not engine.wires.prepared.may_prepare_on(connection)
        or not engine.threads.serves_caller()
    ):
        return None
    statements = engine.statements
    return statements if isinstance(statements, PostgreSQLStatements) else None


async def _execute(
    engine: Engine, statement: tuple[str, Sequence[Any]], *, writes: bool
) -> PGresult | None:
    if engine.wires is None:
        return None
    try:
        return await engine.wires.execute(*statement, writes=writes)
    except (DatabaseError, InterfaceError) as exc:
        raise engine.storage_error(exc) from None
