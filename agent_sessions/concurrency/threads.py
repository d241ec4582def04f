"""Where a backend's statements run: the right thread, with the right connection."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.concurrency.batching import Gathering, Outcomes
from agent_sessions.concurrency.callers import (
    own_connection,
    runs_in_its_thread,
    sync_caller_waits,
)
from agent_sessions.concurrency.connections import (
    chosen_database,
    is_fresh,
    is_pooled,
    make_own,
    refresh,
)
from agent_sessions.concurrency.executor import WarmExecutor
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.settle import settle

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
        """Return how many threads a database gets."""
        return self.size or (1 if connections[database].vendor == "sqlite" else 8)


class DatabaseThreads:
    """A bounded pool of threads that each keep one connection to a database.

    Django gives all websockets of a process one thread and connection, where one
    slow query holds up everybody; these threads don't.
    """

    def __init__(self, database: str, policy: ConnectionPolicy) -> None:
        self.database = database
        self.size = policy.size_for(database)
        self._policy = policy
        self._lock = new_lock()
        self._pid = 0
        self._pool: WarmExecutor | None = None
        self._lender: WarmExecutor | None = None
        self._connections: dict[threading.Thread, BaseDatabaseWrapper] = {}

    async def run(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a blocking function where it sees what its caller sees.

        A caller that holds a transaction, as a view under ATOMIC_REQUESTS or a test
        does, gets it run on its own connection; everybody else gets the pool.
        """
        return await self._begin(function, False, *args, **kwargs)

    async def finish(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function that writes: a cancelled caller learns its outcome too."""
        return await self._begin(function, True, *args, **kwargs)

    async def finish_together(self, gathering: Gathering[A], argument: A) -> None:
        """Write in the pool, with the others that wait for it.

        Only where serves_caller(): those who share a transaction share a connection.
        """
        context = self._context()

        def within(call: Callable[[], Outcomes]) -> Outcomes:
            return context.run(self._on_own_connection, call)

        pool = partial(self._executor, "_pool", self.size)
        await gathering.join(argument, pool, within)

    def here(self, work: Callable[[BaseDatabaseWrapper], T]) -> T | None:
        """Work in the running thread, on the connection of one that has nothing to do.

        None where there is no such thread, or its connection would have to be made anew.
        """
        pool = self._pool
        if pool is None or self._pid != os.getpid():
            return None
        thread = pool.take_idle()
        if thread is None:
            return None
        try:
            connection = self._connections.get(thread)
            if connection is None or not is_fresh(connection):
                return None
            return work(connection)
        finally:
            pool.give_back(thread)

    def serves_caller(self) -> bool:
        """Return whether the caller's statements may run on any other connection."""
        return not (
            self._policy.shared
            or self._policy.prepare is not None
            or sync_caller_waits()
            or _is_lent(own_connection(self.database))
        )

    def _begin(
        self, function: Callable[P, T], settles: bool, *args: P.args, **kwargs: P.kwargs
    ) -> Awaitable[T]:
        call = partial(function, *args, **kwargs)
        if sync_caller_waits():
            return self._in_callers_thread(call, settles)
        own = own_connection(self.database)
        if _is_lent(own) or (self._policy.shared and runs_in_its_thread()):
            lender = self._executor("_lender", 1)
            lent = partial(self._context().run, call)
            return lender.run(partial(self._lend, own, lent), settles=settles)
        if self._policy.shared:
            return self._in_callers_thread(call, settles)
        pool = self._executor("_pool", self.size)
        ours = partial(self._context().run, self._prepared, call)
        return pool.run(partial(self._on_own_connection, ours), settles=settles)

    def _in_callers_thread(self, call: Callable[[], T], settles: bool) -> Awaitable[T]:
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
            pools = [p for p in (self._pool, self._lender) if p is not None]
            opened, self._connections = self._connections, {}
            self._pool = self._lender = None
            inherited = self._pid != os.getpid()
        if inherited:
            return
        for pool in pools:
            pool.shutdown(wait=True)
        close_all(list(opened.values()))

    def _context(self) -> contextvars.Context:
        """Copy the caller's context, with the database that was chosen in it."""
        context = contextvars.copy_context()
        if self._policy.routed:
            context.run(chosen_database.set, self.database)
        return context

    def _executor(self, name: str, size: int) -> WarmExecutor:
        # Threads don't survive a fork.
        if (made := getattr(self, name)) is not None and self._pid == os.getpid():
            return made  # type: ignore[no-any-return]
        with self._lock:
            if self._pid != os.getpid():
                # The parent still uses the sockets.
                self._pool = self._lender = None
                self._connections = {}
                self._pid = os.getpid()
            pool: WarmExecutor | None = getattr(self, name)
            if pool is None:
                pool = WarmExecutor(
                    size,
                    thread_name_prefix=f"agent_sessions-{self.database}",
                    put_away=self._put_away,
                )
                setattr(self, name, pool)
            return pool

    def _put_away(self, threads: Sequence[threading.Thread]) -> None:
        """Close connections of SQLite before a fork; they are opened again on use.

        A child would take their locks on the file for its own, and have none when the
        parent ends: who closes the file next would throw away what the child writes.
        """
        opened = [self._connections.get(each) for each in threads]
        close_all([each for each in opened if each and each.vendor == "sqlite"])

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
            with self._lock:
                self._connections[threading.current_thread()] = connection
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
        self._lock = new_lock()
        self._made: dict[str, DatabaseThreads] = {}

    def of(self, database: str) -> DatabaseThreads:
        """Return the threads for an alias of DATABASES."""
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


def close_all(opened: Sequence[BaseDatabaseWrapper]) -> None:
    """Close connections that other threads have opened."""

    def close() -> None:
        for connection in opened:
            connection.inc_thread_sharing()
            connection.close()

    if opened:
        # In a thread, since Django closes none while a loop runs in its own.
        with ThreadPoolExecutor(1) as closer:
            closer.submit(close).result()


def _is_lent(connection: BaseDatabaseWrapper) -> bool:
    return connection.in_atomic_block or _in_memory(connection)


def _in_memory(connection: BaseDatabaseWrapper) -> bool:
    # Each further connection would open another, empty database.
    return (
        connection.vendor == "sqlite" and connection.is_in_memory_db()  # type: ignore[attr-defined]
    )
