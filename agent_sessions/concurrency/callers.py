"""Who waits for a coroutine, and which connection that code uses.

Two parts of others are used here that are not documented. A test pins each; without
them a call runs on a connection of the pool.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

from asgiref.sync import AsyncToSync
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

# The thread whose synchronous code has opened a session.
_opened_in: ContextVar[int | None] = ContextVar("_opened_in", default=None)


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
