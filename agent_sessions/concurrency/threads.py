"""Where a backend's statements run: the right thread, with the right connection."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.concurrency import forks
from agent_sessions.concurrency.batching import Gathering, Outcomes
from agent_sessions.concurrency.connections import (
    chosen_database,
    is_fresh,
    is_pooled,
    make_own,
    own_connection,
    refresh,
    runs_in_its_thread,
    sync_caller_waits,
)
from agent_sessions.concurrency.settle import Outcome, answered, settle

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    """Which connections serve a backend's async callers.

    `size` is how many threads of ours have one, and None the default of the database.
    With `shared` the caller's own connection is used, as Django's async ORM does.
    `prepare` is called with the connection before each call, in the caller's context.
    `routed` says that a router chooses the database.
    """

    size: int | None = None
    shared: bool = False
    prepare: Callable[[BaseDatabaseWrapper], object] | None = None
    routed: bool = False

    def size_for(self, database: str) -> int:
        return self.size or (1 if connections[database].vendor == "sqlite" else 8)


@dataclass(slots=True)
class _Seat:
    """One of our threads; the lock is held while anybody uses its connection."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    connection: BaseDatabaseWrapper | None = None


class DatabaseThreads:
    """A bounded pool of threads that each keep one connection to a database.

    Django gives all websockets of a process one thread and connection, where one
    slow query holds up everybody; these threads don't.
    """

    def __init__(self, database: str, policy: ConnectionPolicy) -> None:
        self.database = database
        self.size = policy.size_for(database)
        self._policy = policy
        self._lock = threading.Lock()
        self._pid = os.getpid()
        # The threads that serve callers, and one that works on a caller's connection.
        self._pool: ThreadPoolExecutor | None = None
        self._lender: ThreadPoolExecutor | None = None
        self._seats: dict[threading.Thread, _Seat] = {}
        # Used after close(), as by a task that outlives changed settings.
        weakref.finalize(self, _drop, self._seats, self._pid).atexit = False
        # What a fork holds until it is done.
        self._held: list[_Seat] = []
        forks.pools.add(self)

    async def run(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a blocking function where it sees what its caller sees.

        A caller that holds a transaction, as a view under ATOMIC_REQUESTS or a test
        does, gets it run on its own connection; everybody else gets the pool.
        """
        return await self._begin(partial(function, *args, **kwargs), settles=False)

    async def finish(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function that writes: a cancelled caller learns its outcome too."""
        return await self._begin(partial(function, *args, **kwargs), settles=True)

    async def finish_together(self, gathering: Gathering[A], argument: A) -> None:
        """Write in the pool, with the others that wait for it.

        Only where serves_caller(): those who share a transaction share a connection.
        """
        context = self._context()

        def within(call: Callable[[], Outcomes]) -> Outcomes:
            return context.run(self._on_own_connection, call)

        def spawn(work: Callable[[], Callable[[], None]]) -> None:
            self._own_pool().submit(self._work, work)

        await gathering.join(argument, spawn, within)

    def here(self, work: Callable[[BaseDatabaseWrapper], T]) -> T | None:
        """Work in the running thread, on the connection of one that has nothing to do.

        Return None if there is no such thread, or its connection isn't usable.
        """
        if self._pid != os.getpid():
            return None
        for seat in list(self._seats.values()):
            if seat.connection is not None and seat.lock.acquire(blocking=False):
                try:
                    usable = is_fresh(seat.connection)
                    return work(seat.connection) if usable else None
                finally:
                    seat.lock.release()
        return None

    def serves_caller(self) -> bool:
        """Return whether the caller's statements may run on any other connection."""
        return not (
            self._policy.shared
            or self._policy.prepare is not None
            or sync_caller_waits()
            or _is_lent(own_connection(self.database))
        )

    def _begin(self, call: Callable[[], T], *, settles: bool) -> Awaitable[T]:
        if sync_caller_waits():
            return self._in_callers_thread(call, settles=settles)
        own = own_connection(self.database)
        if _is_lent(own) or (self._policy.shared and runs_in_its_thread()):
            pool = self._made("_lender", 1)
            call = partial(self._lend, own, partial(self._context().run, call))
        elif self._policy.shared:
            return self._in_callers_thread(call, settles=settles)
        else:
            pool = self._own_pool()
            prepared = partial(self._context().run, self._prepared, call)
            call = partial(self._on_own_connection, prepared)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = (
            Outcome(loop=loop) if settles else loop.create_future()
        )
        pool.submit(self._work, partial(answered, call, future))
        return future

    def _work(self, work: Callable[[], Callable[[], None]]) -> None:
        thread = threading.current_thread()
        seat = self._seats.get(thread)
        if seat is None:
            with self._lock:
                seat = self._seats[thread] = _Seat()
        with seat.lock:
            tell = work()
        # The connection is free before the caller is told, who may come back at once.
        tell()

    def _in_callers_thread(
        self, call: Callable[[], T], *, settles: bool
    ) -> Awaitable[T]:
        """Run a call where Django runs what an async view asks of its ORM.

        A router is asked there: one that goes by what a middleware has left in that
        thread gives its answer only there.
        """
        if self._policy.shared:
            call = partial(contextvars.copy_context().run, self._prepared, call)
        else:
            call = partial(self._context().run, call)
        begun = sync_to_async(call, thread_sensitive=True)()
        return settle(begun) if settles else begun

    def _prepared(self, call: Callable[[], T]) -> T:
        if self._policy.prepare is not None:
            self._policy.prepare(connections[self.database])
        return call()

    def close(self) -> None:
        """End the threads and close their connections; later calls make new ones."""
        with self._lock:
            if self._pid != os.getpid():
                self._forget()
                return
            pools = (self._pool, self._lender)
            self._pool = self._lender = None
        for pool in pools:
            if pool is not None:
                pool.shutdown(wait=True)
        # Only now: what was under way may have opened connections.
        with self._lock:
            ended = [thread for thread in self._seats if not thread.is_alive()]
            seats = [self._seats.pop(thread) for thread in ended]
        for seat in seats:
            # here() may still use it.
            with seat.lock:
                _close_all([seat])

    def before_fork(self) -> None:
        """Hold back new calls, wait for those under way, and close files of SQLite.

        SQLite's locks of an open transaction would be copied to the child for ever. And
        a child would take the parent's locks on the file for its own, and have none when
        the parent ends: who closes the file next would throw away what the child writes.
        """
        self._lock.acquire()
        if self._pid != os.getpid():
            # What the parent's threads held is never released here.
            self._forget()
        deadline = time.monotonic() + forks.PATIENCE
        seats = list(self._seats.values())
        for seat in seats:
            # A thread that forks itself holds its own lock, and gets it once more.
            if seat.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self._held.append(seat)
        if len(self._held) == len(seats):
            # Its transaction goes on.
            mine = self._seats.get(threading.current_thread())
            found = (each for each in seats if each is not mine)
            _close_all(each for each in found if _is_sqlite(each.connection))

    def after_fork(self, *, in_child: bool) -> None:
        """Allow calls again; by its pid a child knows that it needs new threads."""
        while self._held:
            self._held.pop().lock.release()
        self._lock.release()

    def _context(self) -> contextvars.Context:
        """Copy the caller's context, with the database that was chosen in it."""
        context = contextvars.copy_context()
        if self._policy.routed:
            context.run(chosen_database.set, self.database)
        return context

    def _own_pool(self) -> ThreadPoolExecutor:
        return self._made("_pool", self.size)

    def _made(self, name: str, size: int) -> ThreadPoolExecutor:
        pool: ThreadPoolExecutor | None = getattr(self, name)
        # Threads don't survive a fork.
        if pool is not None and self._pid == os.getpid():
            return pool
        with self._lock:
            if self._pid != os.getpid():
                # The parent still uses the sockets.
                self._forget()
            if (pool := getattr(self, name)) is None:
                pool = ThreadPoolExecutor(size, f"agent_sessions-{self.database}")
                setattr(self, name, pool)
            return pool

    def _forget(self) -> None:
        self._pool = self._lender = None
        self._seats = {}
        self._pid = os.getpid()

    def _on_own_connection(self, call: Callable[[], T]) -> T:
        connection = connections[self.database]
        if is_pooled(connection):
            try:
                return call()
            finally:
                # It goes back to Django's pool, for the rest of the site.
                connection.close()
        if connection.connection is None:
            make_own(connection)
            self._seats[threading.current_thread()].connection = connection
        else:
            refresh(connection)
        return call()

    def _lend(self, connection: BaseDatabaseWrapper, call: Callable[[], T]) -> T:
        """Run on the connection of the thread that waits for us."""
        held: Any = connections[self.database]
        connection.inc_thread_sharing()
        connections[self.database] = connection
        try:
            return call()
        finally:
            connections[self.database] = held
            connection.dec_thread_sharing()


class ThreadsByDatabase:
    """A backend's threads, apart for each database that its calls go to."""

    def __init__(self, policy: ConnectionPolicy) -> None:
        self.policy = policy
        self._lock = forks.new_lock()
        self._made: dict[str, DatabaseThreads] = {}

    def of(self, database: str) -> DatabaseThreads:
        with self._lock:
            if database not in self._made:
                self._made[database] = DatabaseThreads(database, self.policy)
            return self._made[database]

    def close(self) -> None:
        """End all threads and close their connections; later calls make new ones."""
        with self._lock:
            made, self._made = self._made, {}
        for threads in made.values():
            threads.close()


def _close_all(seats: Iterable[_Seat]) -> None:
    """Close connections that other threads have opened."""
    opened = [seat.connection for seat in seats if seat.connection is not None]

    def close() -> None:
        for connection in opened:
            connection.inc_thread_sharing()
            connection.close()

    if opened:
        # In a thread, since Django closes none while a loop runs in its own.
        with ThreadPoolExecutor(1) as closer:
            closer.submit(close).result()


def _drop(seats: dict[threading.Thread, _Seat], pid: int) -> None:
    """Close what nobody can use any more, wherever garbage is collected."""
    for seat in seats.values() if pid == os.getpid() else ():
        driver = None if seat.connection is None else seat.connection.connection
        if driver is not None:
            driver.close()


def _is_lent(connection: BaseDatabaseWrapper) -> bool:
    return connection.in_atomic_block or _in_memory(connection)


def _is_sqlite(connection: BaseDatabaseWrapper | None) -> bool:
    return connection is not None and connection.vendor == "sqlite"


def _in_memory(connection: BaseDatabaseWrapper) -> bool:
    # Each further connection would open another, empty database.
    return (
        connection.vendor == "sqlite" and connection.is_in_memory_db()  # type: ignore[attr-defined]
    )
