"""PostgreSQL: an event loop awaits the statements of a turn on connections of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from agent_sessions.backends.database.answers import Own, Text
from agent_sessions.backends.database.appending import begin_batch
from agent_sessions.backends.database.direct import is_watched
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.reading import MANY, aread_newest
from agent_sessions.backends.keys import SessionKey
from agent_sessions.concurrency.connections import is_fresh
from agent_sessions.concurrency.loops import PerLoop
from agent_sessions.concurrency.settle import settle
from agent_sessions.items import Decode, Item

if TYPE_CHECKING:
    from psycopg import AsyncConnection, AsyncCursor

    from agent_sessions.backends.database.engine import Engine

# A loop that makes few calls needs no more connections than the threads'.
_BEFORE = 16
# "invalid_sql_statement_name", "duplicate_prepared_statement" and "cached plan must not
# change result type": a pooler has changed the connection, or a migration the table.
_REFUSALS = frozenset({"26000", "42P05", "0A000"})


class PostgreSQLTransport:
    """The statements of a turn, prepared, on psycopg's AsyncConnection."""

    def __init__(self, engine: Engine, statements: PostgreSQLStatements) -> None:
        self._engine = engine
        self._statements = statements
        self._is_refused = False
        self._pid = os.getpid()
        self._sets: WeakSet[_Set] = WeakSet()
        self._per_loop = PerLoop(self._make, _Set.aclose)

    async def read(
        self, key: SessionKey, limit: int | None, decode: Decode
    ) -> tuple[list[Item] | None, Own | None]:
        """Read the newest items, or None and the rows from which a thread goes on."""
        if limit == 0:
            return None, None
        return await aread_newest(self._engine, self._ask, (key, limit), decode)

    async def append(self, key: SessionKey, items: Sequence[Item]) -> bool:
        """Store a batch; False, with nothing written, where a thread has to."""
        if len(items) > MANY:
            return False
        engine, batch = self._engine, self._statements.batch(items)
        statement = self._statements.append_statement(
            key, batch, timezone.now(), engine.connection
        )
        cursor = await self._execute(statement, writes=True)
        if cursor is None:
            return False
        if not cursor.rowcount:
            # There is no row of the session, or it isn't the key's.
            await engine.threads.finish(begin_batch, engine, key, batch)
        return True

    def learn(self, key: SessionKey, texts: Sequence[Text]) -> None:
        """Do nothing: what a thread has read isn't faster to read again."""

    def close(self) -> None:
        """Close the connections that are idle, and the others once they are."""
        # Those that a fork has from its parent are still the parent's.
        for each in list(self._sets) if self._pid == os.getpid() else ():
            each.close()

    async def _make(self) -> _Set:
        if self._pid != os.getpid():
            self._pid, self._sets = os.getpid(), WeakSet()
        made = _Set(self._engine)
        self._sets.add(made)
        return made

    async def _ask(
        self, sql: str, params: Sequence[Any]
    ) -> Sequence[Sequence[Any]] | None:
        cursor = await self._execute((sql, params), writes=False)
        return None if cursor is None else await cursor.fetchall()

    async def _execute(
        self, statement: tuple[str, Sequence[Any]], *, writes: bool
    ) -> AsyncCursor[Any] | None:
        """Execute a statement; return None, with nothing done, where a thread has to.

        A cancelled caller learns what became of a statement that writes. Raises
        StorageError.
        """
        if self._is_refused or is_watched(self._engine.connection):
            return None
        connections_ = await self._per_loop.get()
        connections_.calls += 1
        if connections_.calls <= _BEFORE:
            return None
        try:
            return await connections_.execute(*statement, writes=writes)
        except (DatabaseError, InterfaceError) as exc:
            if getattr(exc.__cause__, "sqlstate", None) in _REFUSALS:
                # Nothing has been done: each statement is a transaction.
                self._is_refused = True
                return None
            raise self._engine.storage_error(exc) from None


@dataclass(frozen=True, slots=True)
class _Open:
    """A connection that Django has opened and set up, and how it is awaited."""

    wrapper: BaseDatabaseWrapper
    connection: AsyncConnection[Any]

    def close(self) -> None:
        # Django's own close() is refused while a loop runs, and this waits for nobody.
        self.wrapper.connection.close()


class _Set:
    """The connections of one event loop: as many as there are threads, at most."""

    def __init__(self, engine: Engine) -> None:
        self.calls = 0
        self._database = engine.using
        self._turns = asyncio.Semaphore(engine.threads.size)
        # The last one is used next: its caches are warm.
        self._idle: list[_Open] = []
        self._is_closed = False

    async def execute(
        self, sql: str, params: Sequence[Any], *, writes: bool
    ) -> AsyncCursor[Any]:
        """Execute a statement on a free connection. Raises Django's database errors."""
        async with self._turns:
            while (found := self._take()) is None:
                # A caller that is cancelled meanwhile leaves it to the next one.
                await asyncio.to_thread(self._open)
            values = [None if each is None else str(each) for each in params]
            executing = self._execute(found, sql, values)
            return await (settle(executing) if writes else executing)

    async def _execute(
        self, found: _Open, sql: str, values: Sequence[str | None]
    ) -> AsyncCursor[Any]:
        try:
            with found.wrapper.wrap_database_errors:
                if not found.connection.autocommit:
                    # It is new.
                    await found.connection.set_autocommit(True)
                return await found.connection.execute(sql, values, prepare=True)
        finally:
            self._idle.append(found)
            if self._is_closed:
                self.close()

    def _take(self) -> _Open | None:
        with suppress(IndexError):
            while True:
                found = self._idle.pop()
                if is_fresh(found.wrapper):
                    return found
                found.close()
        return None

    def _open(self) -> None:
        from psycopg import AsyncConnection

        wrapper = connections.create_connection(self._database)
        wrapper.inc_thread_sharing()
        with wrapper.cursor() as cursor:
            # A plan made while the tables were young would read all of them for ever.
            # Whatever Django has prepared, if told to, has names that would come again.
            cursor.execute("SET enable_seqscan = off; DEALLOCATE ALL")
        self._idle.append(_Open(wrapper, AsyncConnection(wrapper.connection.pgconn)))

    def close(self) -> None:
        """Close what is idle, also from another thread, and the others once they are."""
        self._is_closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    async def aclose(self) -> None:
        """See close(); for a loop that ends."""
        self.close()
