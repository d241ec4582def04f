"""What must be at rest while a process forks, as `gunicorn --preload` does.

A child has none of its parent's other threads. What one of them held would be held for
ever, and a client that has threads, as gRPC's, would wait for them or crash. So before
a fork no lock is held, no call is under way, and such clients are closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

logger = logging.getLogger("agent_sessions.backends")

# Seconds for which a fork waits for calls under way, or for a loop that is busy.
PATIENCE = 30.0
# Seconds for which it waits for locks; none is held for long.
_LOCK_PATIENCE = 5.0

_Duty = Coroutine[Any, Any, Any]


class _Threads(Protocol):
    """Threads that work for others."""

    def before_fork(self) -> None:
        """Hold back new calls until after_fork(), and wait for those under way."""

    def after_fork(self, *, in_child: bool) -> None:
        """Allow calls again, in a child with other threads."""


class _Clients(Protocol):
    """Clients of several loops."""

    def before_fork(self) -> dict[asyncio.AbstractEventLoop, _Duty]:
        """Return what each loop has to do before a fork."""

    def after_fork(self) -> None:
        """Start again in a child."""


# In this order: calls of the loops use the pools.
loops: WeakSet[_Threads] = WeakSet()
clients: WeakSet[_Clients] = WeakSet()
pools: WeakSet[_Threads] = WeakSet()
# What a child never lets go of. Loops share their selector with the parent: were they or
# their clients let go of, the parent would hear no more. A connection to MariaDB would
# say goodbye for the parent, and one to SQLite roll back the parent's transaction.
inherited: list[Any] = []
# A child that ends as Python does would empty this module first.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
_locks: WeakSet[threading.Lock] = WeakSet()


def new_lock() -> threading.Lock:
    """Make a lock that nobody holds in a child, for what lives longer than a call."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


_connections: WeakSet[Any] = WeakSet()
_connections_lock = new_lock()


def remember_connection(connection: Any, **kwargs: object) -> None:
    """Remember a connection: at a fork, those of other threads can't be found."""
    with _connections_lock:
        _connections.add(connection)


class _Fork:
    """One fork at a time, and what waits until it is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._resting: list[_Threads] = []
        self._parked: list[threading.Event] = []
        self._held: list[threading.Lock] = []
        self._opened: list[Any] = []

    def before(self) -> None:
        """Close what has threads, and hold back new calls."""
        self._lock.acquire()
        self._rest(loops)
        duties: dict[asyncio.AbstractEventLoop, list[_Duty]] = {}
        for kept in list(clients):
            for loop, duty in kept.before_fork().items():
                duties.setdefault(loop, []).append(duty)
        for loop, found in duties.items():
            if not self._park(loop, found):
                logger.warning(
                    "A fork found a store's client in use, with threads that the child "
                    "won't have. Fork when no request is under way in the same loop."
                )
        self._rest(pools)
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not self._take_locks() and time.monotonic() < deadline:
            time.sleep(0.001)
        # Before Python forgets the other threads, and with them what they alone knew.
        self._opened = [each.connection for each in _connections if each.connection]

    def after(self, *, in_child: bool) -> None:
        """Allow everything again; in a child, begin anew."""
        opened, self._opened = self._opened, []
        self._release_locks()
        if in_child:
            inherited.append(opened)
            for kept in list(clients):
                kept.after_fork()
        while self._parked:
            self._parked.pop().set()
        while self._resting:
            self._resting.pop().after_fork(in_child=in_child)
        self._lock.release()

    def _rest(self, threads: WeakSet[_Threads]) -> None:
        for each in list(threads):
            each.before_fork()
            self._resting.append(each)

    def _park(self, loop: asyncio.AbstractEventLoop, duties: list[_Duty]) -> bool:
        """Run the duties of a loop in it, and hold it until the fork is done."""
        if not loop.is_running() or loop is _running_loop():
            return sum(_finishes_at_once(duty) for duty in duties) == len(duties)
        done, release = threading.Event(), threading.Event()

        async def main() -> None:
            try:
                for duty in duties:
                    await duty
            finally:
                done.set()
                # Nothing else in this loop may begin a request before the fork.
                release.wait(PATIENCE)

        asyncio.run_coroutine_threadsafe(main(), loop)
        self._parked.append(release)
        return done.wait(PATIENCE)

    def _take_locks(self) -> bool:
        """Acquire every lock or none: others may acquire two of them in another order."""
        for lock in list(_locks):
            if not lock.acquire(timeout=0.01):
                self._release_locks()
                return False
            self._held.append(lock)
        return True

    def _release_locks(self) -> None:
        while self._held:
            self._held.pop().release()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _finishes_at_once(duty: _Duty) -> bool:
    try:
        duty.send(None)
    except StopIteration:
        return True
    except RuntimeError:
        # What it would wait for needs a running loop.
        return False
    duty.close()
    return False


if hasattr(os, "register_at_fork"):
    _fork = _Fork()
    os.register_at_fork(
        before=_fork.before,
        after_in_parent=partial(_fork.after, in_child=False),
        after_in_child=partial(_fork.after, in_child=True),
    )
