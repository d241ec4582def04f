"""PostgreSQL: an event loop awaits the statements of a turn on connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone
from psycopg import AsyncConnection
from psycopg.abc import PQGen
from psycopg.waiting import READY_R, READY_W, WAIT_W

from agent_sessions.backends.database.history import MANY, Reading, append_batch
from agent_sessions.backends.database.sql.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.sql.sqlite import is_watched
from agent_sessions.backends.keys import SessionKey
from agent_sessions.concurrency.connections import is_fresh, make_own
from agent_sessions.concurrency.loops import PerLoop
from agent_sessions.concurrency.settle import Outcome
from agent_sessions.items import Item

if TYPE_CHECKING:
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
        self._pools = PerLoop(partial(_Pool, engine), _Pool.close)

    async def read(self, reading: Reading) -> list[Item]:
        """Read in the loop; a thread decodes what is much."""
        return await reading.begin(self._run)

    async def append(self, key: SessionKey, items: Sequence[Item]) -> bool:
        """Store a batch; False, with nothing written, where a thread has to."""
        if len(items) > MANY or key.branch is not None:
            return False
        engine, batch = self._engine, self._statements.batch(items)
        statement = self._statements.append_statement(key, batch, timezone.now())
        stored = await self._run(*statement, writes=True)
        if stored == 0:
            # There is no row of the session, or it isn't the key's.
            await engine.threads.finish(append_batch, engine, key, batch, is_first=True)
        return stored is not None

    def close(self) -> None:
        """Close the connections that are idle, and the others once they are."""
        for pool in self._pools.every():
            pool.close()

    async def _run(self, sql: str, params: Sequence[Any], writes: bool = False) -> Any:
        """Return what a statement reads, or how many rows it has written.

        None, with nothing done, says that a thread has to. Raises StorageError.
        """
        if self._is_refused:
            return None
        pool = await self._pools.get()
        try:
            return await pool.execute(sql, params, writes=writes)
        except (DatabaseError, InterfaceError) as exc:
            if getattr(exc.__cause__, "sqlstate", None) in _REFUSALS:
                # Nothing has been done: each statement is a transaction.
                self._is_refused = True
                return None
            raise self._engine.storage_error(exc) from None


class _Connection(AsyncConnection[Any]):
    """A connection that Django has opened and set up, awaited by the loop.

    Psycopg's own timer and registrations take a third of the time of a turn.
    """

    # Whether a cancelled caller is told only after the statement has ended.
    settles = False

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper.connection.pgconn)
        self.wrapper = wrapper

    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Await what a generator asks for each time it would block."""
        loop, socket = asyncio.get_running_loop(), self.fileno()
        cancelled: asyncio.CancelledError | None = None
        waiting: asyncio.Future[int]

        def wake(state: int) -> None:
            # What comes in between is told again.
            if not waiting.done():
                waiting.set_result(state)

        try:
            wanted = next(gen)
            loop.add_reader(socket, wake, READY_R)
            while True:
                if wanted & WAIT_W:
                    loop.add_writer(socket, wake, READY_W)
                waiting = Outcome(loop=loop) if self.settles else loop.create_future()
                try:
                    await waiting
                except asyncio.CancelledError as exc:
                    if not self.settles:
                        raise
                    cancelled = cancelled or exc
                finally:
                    if wanted & WAIT_W:
                        loop.remove_writer(socket)
                wanted = gen.send(waiting.result())
        except StopIteration as exc:
            if cancelled is not None:
                raise cancelled from None
            return exc.value
        finally:
            loop.remove_reader(socket)

    def drop(self) -> None:
        """Close it; Django's own close() is refused while a loop runs."""
        self.wrapper.connection.close()


class _Pool:
    """The connections of one event loop: as many as there are threads, at most."""

    def __init__(self, engine: Engine) -> None:
        self._calls = 0
        self._database = engine.using
        self._turns = asyncio.Semaphore(engine.threads.size)
        # The last one is used next: its caches are warm.
        self._idle: list[_Connection] = []
        self._is_closed = False

    async def execute(self, sql: str, params: Sequence[Any], *, writes: bool) -> Any:
        """Execute a statement on a free connection. Raises Django's errors."""
        self._calls += 1
        if self._calls <= _BEFORE:
            return None
        async with self._turns:
            while (found := self._take()) is None:
                await asyncio.to_thread(self._open)
            try:
                if is_watched(found.wrapper):
                    return None
                found.settles = writes
                values = [None if each is None else str(each) for each in params]
                with found.wrapper.wrap_database_errors:
                    if not found.autocommit:  # a new one
                        await found.set_autocommit(True)
                    cursor = await found.execute(sql, values, prepare=True)
                    return cursor.rowcount if writes else await cursor.fetchall()
            except asyncio.CancelledError:
                if not writes:
                    # The rest of what it read would come first.
                    found.drop()
                raise
            finally:
                # A closed one is dropped at its next use.
                self._idle.append(found)
                if self._is_closed:
                    self.close()

    def _take(self) -> _Connection | None:
        # Another thread may close what is idle.
        with suppress(IndexError):
            while not is_fresh((found := self._idle.pop()).wrapper):
                found.drop()
            return found
        return None

    def _open(self) -> None:
        wrapper = connections.create_connection(self._database)
        wrapper.inc_thread_sharing()
        make_own(wrapper)
        with wrapper.cursor() as cursor:
            # Whatever Django has prepared, if told to, has names that would come again.
            cursor.execute("DEALLOCATE ALL")
        self._idle.append(_Connection(wrapper))

    def close(self) -> None:
        """Close what is idle, also from another thread, and the others once they are."""
        self._is_closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().drop()
