"""Connections to PostgreSQL whose answers the event loop awaits, without a thread."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, InterfaceError, connections

from agent_sessions.backends.database.prepared import (
    PreparedStatements,
    checked,
    wire_values,
)
from agent_sessions.concurrency.connections import is_fresh, refresh
from agent_sessions.concurrency.executor import Outcome
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.threads import close_all

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

# A process that makes few calls needs no more connections than its threads'.
_BEFORE = 16
# So many statements a new connection has planned at once: those that were last new.
_PREPARED = 4


class Wires:
    """A bounded pool of connections for the statements that each turn needs.

    To wake a thread and to be woken by it takes as long as such a statement does. While
    a connection is made ready, which is done aside, statements are left to the threads.
    """

    def __init__(self, database: str, size: int, prepared: PreparedStatements) -> None:
        self.database = database
        self.size = size
        self.prepared = prepared
        self._lock = new_lock()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._calls = 0
        self._wires: list[Wire] = []
        self._idle: list[Wire] = []
        self._waiting: deque[asyncio.Future[Wire | None]] = deque()
        # What was asked for so far, the last one last.
        self._statements: dict[str, None] = {}
        self._opening: set[Wire] = set()
        self._opener: ThreadPoolExecutor | None = None

    async def execute(
        self, sql: str, params: Sequence[Any], *, writes: bool
    ) -> PGresult | None:
        """Execute a statement; None, with nothing done, where a thread has to.

        A cancelled caller learns what became of a statement that writes. Raises Django's
        database errors.
        """
        wire = await self._take()
        if wire is None:
            return None
        if not (wire.is_ready() and self.prepared.knows(wire.connection, sql)):
            self._open(wire, sql)
            return None
        try:
            with wire.connection.wrap_database_errors:
                loop = asyncio.get_running_loop()
                answer: asyncio.Future[PGresult] = (
                    Outcome(loop=loop) if writes else loop.create_future()
                )
                wire.send(self.prepared.name(sql), wire_values(params), answer)
                return checked(await answer)
        except DatabaseError as exc:
            if not self.prepared.is_refusal(exc):
                raise
            return None

    def close(self) -> None:
        """Close the connections; later calls make new ones."""
        with self._lock:
            wires, opener, pid = self._wires, self._opener, self._pid
            waiting = self._waiting
            self._begin()
        if pid != os.getpid():
            return
        for turn in waiting:
            with suppress(RuntimeError):
                turn.get_loop().call_soon_threadsafe(self._hand, turn, None)
        if opener is not None:
            opener.shutdown(cancel_futures=True)
        # What is at work still is closed when it is given back.
        close_all([wire.connection for wire in wires if not wire.is_busy()])

    @property
    def free(self) -> int:
        """How many connections wait to be used."""
        with self._lock:
            return len(self._idle)

    async def _take(self) -> Wire | None:
        """Return a free connection; None while others are being made ready."""
        with self._lock:
            if self._pid != os.getpid():
                # The parent still uses the sockets.
                self._begin()
            self._calls += 1
            if self._calls <= _BEFORE:
                return None
            wire = self._free()
            if wire is not None or self._opening:
                return wire
            turn: asyncio.Future[Wire | None] = (
                asyncio.get_running_loop().create_future()
            )
            self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            wire = turn.result() if turn.done() and not turn.cancelled() else None
            if wire is not None:
                self._give_back(wire)
            raise

    def _free(self) -> Wire | None:
        if self._idle:
            return self._idle.pop()
        if len(self._wires) < self.size and not self._opening:
            wire = Wire(self.database, self._give_back)
            self._wires.append(wire)
            return wire
        return next((wire for wire in self._wires if wire.win_back()), None)

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            is_ours = wire in self._wires
            while is_ours and self._waiting:
                turn = self._waiting.popleft()
                # Nobody is there any more where the loop has been closed.
                with suppress(RuntimeError):
                    turn.get_loop().call_soon_threadsafe(self._hand, turn, wire)
                    return
            if is_ours:
                # The one that was used last is used next: its caches are warm.
                self._idle.append(wire)
        if not is_ours:
            close_all([wire.connection])

    def _hand(self, turn: asyncio.Future[Wire | None], wire: Wire | None) -> None:
        if not turn.done():
            turn.set_result(wire)
        elif wire is not None:
            self._give_back(wire)

    def _open(self, wire: Wire, sql: str) -> None:
        with self._lock:
            if self._opener is None:
                self._opener = ThreadPoolExecutor(
                    1, thread_name_prefix=f"agent_sessions-{self.database}-opener"
                )
            self._opening.add(wire)
            self._statements.pop(sql, None)
            self._statements[sql] = None
            statements = list(self._statements)[-_PREPARED:]
            self._opener.submit(self._make_ready, wire, statements)

    def _make_ready(self, wire: Wire, statements: Sequence[str]) -> None:
        try:
            wire.connect()
            for sql in statements:
                self.prepared.prepare(wire.connection, sql)
        except DatabaseError as exc:
            # The thread that does the work meanwhile tells what is wrong.
            self.prepared.is_refusal(exc)
        except InterfaceError:
            pass
        finally:
            with self._lock:
                self._opening.discard(wire)
            self._give_back(wire)


class Wire:
    """One connection, which executes one statement at a time for a loop that asks.

    Any loop may, also one of another thread: it belongs to none between statements.
    """

    def __init__(self, database: str, give_back: Callable[[Wire], None]) -> None:
        self.connection = connections.create_connection(database)
        self.connection.inc_thread_sharing()
        self._give_back = give_back
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_left = False

    def is_ready(self) -> bool:
        """Return whether connect() has nothing to do."""
        return not self._is_left and is_fresh(self.connection)

    def connect(self) -> None:
        """Connect, again if need be. Raises Django's database errors."""
        if self._is_left:
            # What it has to say still is for somebody who is gone.
            self._is_left = False
            self.connection.close()
        refresh(self.connection)
        self.connection.ensure_connection()

    def is_busy(self) -> bool:
        """Return whether a loop awaits a statement."""
        return self._loop is not None and not self._loop.is_closed()

    def win_back(self) -> bool:
        """Take it from a loop that has ended; tell whether it was such a one's."""
        if self._loop is None or not self._loop.is_closed():
            return False
        self._loop = None
        self._is_left = True
        return True

    def send(
        self,
        name: bytes,
        values: Sequence[bytes | None],
        answer: asyncio.Future[PGresult],
    ) -> None:
        """Execute what the connection has prepared, then be free for others.

        The answer, a future of the running loop, may raise psycopg.Error; where it is
        cancelled the statement is executed nevertheless.
        """
        self._loop = answer.get_loop()
        self._answer = answer
        self._result: PGresult | None = None
        self._pgconn: PGconn = self.connection.connection.pgconn
        self._socket = self._pgconn.socket
        try:
            self._pgconn.send_query_prepared(name, values)
            self._loop.add_reader(self._socket, self._read)
            if self._pgconn.flush():
                self._loop.add_writer(self._socket, self._write)
        except Exception as exc:
            self._end(exc)

    def _write(self) -> None:
        try:
            if not self._pgconn.flush() and self._loop is not None:
                self._loop.remove_writer(self._socket)
        except Exception as exc:
            self._end(exc)

    def _read(self) -> None:
        try:
            self._pgconn.consume_input()
            while not self._pgconn.is_busy():
                result = self._pgconn.get_result()
                if result is None:
                    self._end()
                    return
                self._result = result
        except Exception as exc:
            self._end(exc)

    def _end(self, error: Exception | None = None) -> None:
        if self._loop is None:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._loop = None
        answer, result = self._answer, self._result
        if error is not None:
            self.connection.errors_occurred = True
        # Before the caller is told, who may come back at once.
        self._give_back(self)
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        elif result is not None:
            answer.set_result(result)
