"""Clients that belong to one event loop, and a loop for callers who have none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
)
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

C = TypeVar("C")
T = TypeVar("T")

# The thread that waits for the coroutine that is running, if one does.
_waiting: ContextVar[_Waiting | None] = ContextVar("_waiting", default=None)


class _Waiting:
    """A thread that waits for a coroutine, and does its errands meanwhile."""

    def __init__(self) -> None:
        self._errands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._gone = False

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Have a function called by the waiting thread."""
        done: Future[T] = Future()

        def errand() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except Exception as exc:
                done.set_exception(exc)
            except BaseException as exc:
                # Ctrl-C is the waiting thread's own.
                done.set_exception(InterruptedError(type(exc).__name__))
                raise
            else:
                done.set_result(result)

        with self._lock:
            if self._gone:
                done.cancel()
            else:
                self._open.add(done)
                self._errands.put(errand)
        return done

    def serve(self, future: Future[T]) -> T:
        """Do errands until the coroutine has ended; give its result."""
        future.add_done_callback(lambda _: self._errands.put(None))
        try:
            while (errand := self._errands.get()) is not None:
                errand()
            return future.result()
        finally:
            with self._lock:
                self._gone = True
            for left in self._open:
                left.cancel()


async def with_caller(function: Callable[[], T]) -> tuple[bool, T | None]:
    """Call a function in the thread that waits for this coroutine, if one does.

    There it sees its caller's open transaction. Gives whether a thread waits, and
    the function's result.
    """
    waiting = _waiting.get()
    if waiting is None:
        return False, None
    return True, await asyncio.wrap_future(waiting.ask(function))


async def take(source: AsyncIterator[T], most: int) -> list[T]:
    """Take the next items, up to `most`; fewer are the last ones."""
    taken: list[T] = []
    async for each in source:
        taken.append(each)
        if len(taken) == most:
            break
    return taken


class PerLoop(Generic[C]):
    """One client for each event loop, closed when its loop is shut down.

    `make` builds a client in the running loop, `close` closes it there.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[C]],
        close: Callable[[C], Awaitable[object]],
    ) -> None:
        self._make = make
        self._close = close
        self._keepers: WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[AsyncGenerator[C], C]
        ] = WeakKeyDictionary()
        self._making: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
            WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    async def get(self) -> C:
        """Give the running loop's client, made on first use."""
        loop = asyncio.get_running_loop()
        with self._lock:
            found = self._keepers.get(loop)
            making = self._making.setdefault(loop, asyncio.Lock())
        if found is not None:
            return found[1]
        async with making:
            with self._lock:
                found = self._keepers.get(loop)
            if found is None:
                keeper = self._keep()
                found = keeper, await anext(keeper)
                with self._lock:
                    self._keepers[loop] = found
        return found[1]

    async def aclose(self) -> None:
        """Close the running loop's client; the next use makes another."""
        with self._lock:
            found = self._keepers.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found[0].aclose()

    async def _keep(self) -> AsyncGenerator[C]:
        # asyncio.run() and async_to_sync() close a loop's open generators before the
        # loop, which is the one moment at which a client can still say goodbye.
        client = await self._make()
        try:
            yield client
        finally:
            await self._close(client)


class BackgroundLoop:
    """An event loop in a thread of its own, for synchronous callers.

    One loop serves them all, so that clients are kept between calls. It begins with
    the first call, and anew after a fork.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and give its result.

        Meanwhile the calling thread does what the coroutine asks of it by
        with_caller().
        """
        loop = self._running()
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("A store's own coroutine must not call its sync face.")
        waiting = _Waiting()

        async def main() -> T:
            _waiting.set(waiting)
            return await coroutine

        future = asyncio.run_coroutine_threadsafe(main(), loop)
        try:
            return waiting.serve(future)
        except BaseException:
            # Ctrl-C: nobody waits for the rest.
            future.cancel()
            raise

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there for a caller in another event loop."""
        loop = self._running()
        if asyncio.get_running_loop() is loop:
            return await coroutine
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread; a later call begins another."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            inherited = self._pid != os.getpid()
        if loop is None or thread is None or inherited:
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=[self._loop], name=self._name, daemon=True
                )
                self._thread.start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
