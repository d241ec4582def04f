"""Which connection a call uses, how it plans, and whether a kept one is usable.

Three parts of others are used here that are not documented. A test pins each; without
them a call runs on a connection of the pool.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar
from weakref import WeakSet

from asgiref.sync import AsyncToSync, SyncToAsync
from django.db import Error, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver

T = TypeVar("T")

# MariaDB's and MySQL's "deadlock found" and "lock wait timeout exceeded"; PostgreSQL's
# "serialization failure" and "deadlock detected".
_RETRIED_ERRORS = frozenset({1213, 1205, "40001", "40P01"})
_ATTEMPTS = 8

# What the router answered in the caller, for the thread that works for it.
chosen_database: ContextVar[str | None] = ContextVar("chosen_database", default=None)
# The thread whose synchronous code has opened a session.
_opened_in: ContextVar[int | None] = ContextVar("_opened_in", default=None)

# A plan that PostgreSQL keeps from when its tables filled a page or two reads all of
# them until the next ANALYZE, and so do its checks of foreign keys.
BY_INDEX = "SET {}enable_seqscan = off"
# Connections that only the app uses, on which all plans go by indexes.
_own: WeakSet[BaseDatabaseWrapper] = WeakSet()


def make_own(connection: BaseDatabaseWrapper) -> None:
    """Set up a connection for the app alone, once it is opened."""
    # What a pool or a pooler gives to others must stay as it was.
    if not is_pooled(connection) and not connection.settings_dict.get(
        "DISABLE_SERVER_SIDE_CURSORS"
    ):
        _own.add(connection)


@receiver(connection_created, dispatch_uid="agent_sessions.by_index")
def _set_up(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    if connection.vendor == "postgresql" and connection in _own:
        with connection.cursor() as cursor:
            cursor.execute(BY_INDEX.format(""))


def is_shared(connection: BaseDatabaseWrapper) -> bool:
    """Return whether others of the project use a connection to PostgreSQL too."""
    return connection.vendor == "postgresql" and connection not in _own


@contextmanager
def unprepared(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Keep no plans of the block's statements on a connection that others use too."""
    threshold = None
    if is_shared(connection):
        threshold = getattr(connection.connection, "prepare_threshold", None)
    if threshold is None:
        yield
        return
    driver: Any = connection.connection
    driver.prepare_threshold = None
    try:
        yield
    finally:
        driver.prepare_threshold = threshold


@contextmanager
def atomic(using: str) -> Iterator[None]:
    """Run a block in a transaction whose plans go by indexes.

    A caller's own transaction goes on after the block, and plans as it did.
    """
    connection = connections[using]
    is_ours = not connection.in_atomic_block and connection.get_autocommit()
    with transaction.atomic(using), unprepared(connection):
        if is_ours and is_shared(connection):
            with connection.cursor() as cursor:
                cursor.execute(BY_INDEX.format("LOCAL "))
        yield


def transact(using: str, operation: Callable[[], T], *, alone: bool = False) -> T:
    """Run an operation in one transaction, again where the database asks for it.

    A caller's own transaction is the caller's to repeat. `alone` says that the
    operation is atomic without a transaction.
    """
    connection = connections[using]
    attempts = 1 if connection.in_atomic_block else _ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            with unprepared(connection) if alone else atomic(using):
                return operation()
        except OperationalError as exc:
            if attempt == attempts or not _is_retried(exc):
                raise
            time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - no secret
    raise AssertionError("the last attempt returns or raises")


def _is_retried(exc: OperationalError) -> bool:
    number = exc.args[0] if exc.args else None
    # psycopg2 has another name for the state.
    states = (getattr(exc.__cause__, name, None) for name in ("sqlstate", "pgcode"))
    return not _RETRIED_ERRORS.isdisjoint({number, *states})


@contextmanager
def choosing(database: str) -> Iterator[None]:
    """Use a database as the router's answer in the block."""
    token = chosen_database.set(database)
    try:
        yield
    finally:
        chosen_database.reset(token)


# -- callers --------------------------------------------------------------------------


def note_opening() -> None:
    """Remember the running thread if synchronous code runs in it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _opened_in.set(threading.get_ident())


def runs_in_its_thread() -> bool:
    """Return whether the running loop blocks the code that has opened the session.

    `Runner.run_sync()` in a view runs such a loop.
    """
    return _opened_in.get() == threading.get_ident()


def sync_caller_waits() -> bool:
    """Return whether async_to_sync() runs the coroutine for a caller that waits.

    asgiref keeps this for its own use.
    """
    executors = getattr(AsyncToSync, "executors", None)
    return getattr(executors, "current", None) is not None


def waiting_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running loop that waits for the synchronous code of this thread.

    asgiref notes it for async_to_sync(), which runs coroutines there.
    """
    noted = getattr(SyncToAsync, "threadlocal", None)
    loop: asyncio.AbstractEventLoop | None = getattr(noted, "main_event_loop", None)
    if loop is None or getattr(noted, "main_event_loop_pid", None) != os.getpid():
        return None
    return loop if loop.is_running() else None


def without_caller() -> Context:
    """Copy the context for work that outlives the synchronous caller that waits.

    Synchronous middleware around an async view is such a caller, in a server's loop. A
    loop that async_to_sync() has made ends with its caller, whose thread serves all.
    """
    context = copy_context()
    loops = getattr(AsyncToSync, "loop_thread_executors", {})
    try:
        has_own_loop = asyncio.get_running_loop() in loops
    except RuntimeError:
        has_own_loop = False
    if sync_caller_waits() and not has_own_loop:
        context.run(setattr, AsyncToSync.executors, "current", None)
    return context


def own_connection(database: str) -> BaseDatabaseWrapper:
    """Return the connection that the synchronous code of this thread uses.

    Inside a running loop Django gives each task another one, so that a run in
    Runner.run_sync() would not see the transaction of its caller. asyncio keeps the
    function that says which loop runs for event loops.
    """
    say = getattr(asyncio, "_set_running_loop", None)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        say = None
    if say is None:
        return connections[database]
    say(None)
    try:
        return connections[database]
    finally:
        say(loop)


# -- connections that are kept ---------------------------------------------------------


def is_pooled(connection: BaseDatabaseWrapper) -> bool:
    """Return whether Django takes a database's connections from a pool."""
    return bool((connection.settings_dict.get("OPTIONS") or {}).get("pool"))


def refresh(connection: BaseDatabaseWrapper) -> None:
    """Close a connection that is too old or whose server has closed it."""
    if connection.vendor == "sqlite" and is_fresh(connection):
        # No server has a say in it.
        return
    _keep(connection)
    if _has_news(connection):
        # A server says nothing between statements, other than goodbye.
        connection.errors_occurred = True
    connection.close_if_unusable_or_obsolete()


def is_fresh(connection: BaseDatabaseWrapper) -> bool:
    """Return whether refresh() would leave a connection as it is; never block."""
    _keep(connection)
    return (
        connection.connection is not None
        and not connection.errors_occurred
        and (connection.close_at is None or time.monotonic() < connection.close_at)
        and not _has_news(connection)
    )


def _keep(connection: BaseDatabaseWrapper) -> None:
    if not connection.settings_dict["CONN_MAX_AGE"]:
        # 0 means until the request's end, but these serve no request, and connecting
        # costs many times what a statement does.
        connection.close_at = None


def _has_news(connection: BaseDatabaseWrapper) -> bool:
    """Return whether something lies in the socket, without asking the server."""
    fileno = getattr(connection.connection, "fileno", None)
    if fileno is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        with connection.wrap_database_errors:
            poll.register(fileno(), select.POLLIN)
    except Error:
        # The driver knows that it is closed.
        return True
    return bool(poll.poll(0))
