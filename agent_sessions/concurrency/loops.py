"""Clients that belong to one event loop, and a loop for callers who have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
)
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

from agent_sessions.concurrency import forks
from agent_sessions.exceptions import StoreUnavailable

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
        """Call a function in the waiting thread."""
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
        """Do errands until the coroutine has ended; return its result."""
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

    There it sees its caller's open transaction. Return whether a thread waits, and
    the function's result.
    """
    waiting = _waiting.get()
    if waiting is None:
        return False, None
    return True, await asyncio.wrap_future(waiting.ask(function))


async def take(source: AsyncIterator[T], most: int) -> list[T]:
    taken: list[T] = []
    async for each in source:
        taken.append(each)
        if len(taken) == most:
            break
    return taken


class HomeLoop:
    """The event loop of a client that was given: the one that uses it first."""

    def __init__(self) -> None:
        self._loop: ref[asyncio.AbstractEventLoop] | None = None
        self._lock = forks.new_lock()

    def is_here(self) -> bool:
        """Return whether the running loop is the client's; the first one becomes it."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._loop is None:
                self._loop = ref(loop)
            return self._loop() is loop


# The generators that close the clients of each loop. One that was garbage in the last
# moments of its loop would be closed by nobody.
_keepers_of: dict[asyncio.AbstractEventLoop, set[AsyncGenerator[Any]]] = {}


def _let_go(loop: asyncio.AbstractEventLoop, keeper: AsyncGenerator[Any]) -> None:
    keepers = _keepers_of.get(loop, set())
    keepers.discard(keeper)
    if not keepers:
        _keepers_of.pop(loop, None)


class PerLoop(Generic[C]):
    """One client for each event loop, closed when its loop is shut down.

    `make` builds a client in the running loop, `close` closes it there; either may be a
    coroutine function. A client with threads of its own is not to see a fork: `put_away`
    ends them before, and the client begins anew where it is used again.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[C] | C],
        close: Callable[[C], Awaitable[object] | None],
        *,
        put_away: Callable[[C], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        self._make = make
        self._close = close
        self._put_away = put_away
        self._keepers: WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[AsyncGenerator[C], C]
        ] = WeakKeyDictionary()
        self._making: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
            WeakKeyDictionary()
        )
        self._lock = forks.new_lock()
        forks.clients.add(self)

    async def get(self) -> C:
        """Return the running loop's client, made on first use."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if (found := self._keepers.get(loop)) is not None:
                return found[1]
            making = self._making.setdefault(loop, asyncio.Lock())
        async with making:
            with self._lock:
                found = self._keepers.get(loop)
            if found is None:
                keeper = self._keep(loop)
                found = keeper, await anext(keeper)
                with self._lock:
                    self._drop_closed()
                    self._keepers[loop] = found
                    _keepers_of.setdefault(loop, set()).add(keeper)
        return found[1]

    def every(self) -> list[C]:
        with self._lock:
            return [client for _, client in self._keepers.values()]

    async def aclose(self) -> None:
        """Close the running loop's client; the next use makes another."""
        with self._lock:
            found = self._keepers.get(asyncio.get_running_loop())
        if found is not None:
            await found[0].aclose()

    async def _keep(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[C]:
        # asyncio.run() and async_to_sync() close a loop's open generators before the
        # loop, which is the one moment at which a client can still say goodbye.
        made = self._make()
        client: C = await made if isinstance(made, Awaitable) else made
        try:
            yield client
        finally:
            with self._lock:
                # A client may hold its loop, which then would never be let go of.
                if (found := self._keepers.pop(loop, None)) is not None:
                    _let_go(loop, found[0])
                self._making.pop(loop, None)
            closing = self._close(client)
            if closing is not None:
                await closing

    def _drop_closed(self) -> None:
        """Forget loops that were closed without closing their generators."""
        for loop in [each for each in self._making if each.is_closed()]:
            self._keepers.pop(loop, None)
            del self._making[loop]
        for loop in [each for each in tuple(_keepers_of) if each.is_closed()]:
            _keepers_of.pop(loop, None)

    def before_fork(self) -> dict[asyncio.AbstractEventLoop, Coroutine[Any, Any, Any]]:
        """Return what each loop that is still open has to do before a fork."""
        if self._put_away is None:
            return {}
        with self._lock:
            found = list(self._making.items())
        return {
            loop: self._rest(loop, making)
            for loop, making in found
            if not loop.is_closed()
        }

    async def _rest(
        self, loop: asyncio.AbstractEventLoop, making: asyncio.Lock
    ) -> None:
        # A client that is being made has threads and locks before it is kept.
        async with making:
            found = self._keepers.get(loop)
            if found is not None and self._put_away is not None:
                await self._put_away(found[1])

    def after_fork(self) -> None:
        forks.inherited.append((self._keepers, self._making))
        self._keepers, self._making = WeakKeyDictionary(), WeakKeyDictionary()


class BackgroundLoop:
    """An event loop in a thread of its own, for synchronous callers.

    One loop serves them all, so that clients are kept between calls. It begins with
    the first call. A fork waits for the calls under way, then the loop and its clients
    are closed; parent and child begin others.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[Future[Any]] = set()
        # Threads that wait for a call.
        self._callers: set[int] = set()
        # Whether a fork holds the lock; it can't while the loop that forks is closed.
        self._is_held = False
        forks.loops.add(self)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return its result.

        Meanwhile the calling thread does what the coroutine asks of it by
        with_caller(). Raises StoreUnavailable where the loop is closed meanwhile.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("A store's own coroutine must not call its sync face.")
        waiting = _Waiting()

        async def main() -> T:
            _waiting.set(waiting)
            return await coroutine

        future = self._submit(main())
        caller = threading.get_ident()
        nested = caller in self._callers
        self._callers.add(caller)
        try:
            return waiting.serve(future)
        except CancelledError as exc:
            raise StoreUnavailable(
                "The backend was closed while it was used. Try again."
            ) from exc
        except BaseException:
            # Ctrl-C: nobody waits for the rest.
            future.cancel()
            raise
        finally:
            if not nested:
                self._callers.discard(caller)

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there for a caller in another event loop."""
        if asyncio.get_running_loop() is self._loop:
            return await coroutine
        return await asyncio.wrap_future(self._submit(coroutine))

    def close(self) -> None:
        """End the thread; who waits is told so, and a later call begins another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        # Under the lock: what is submitted comes before what close() says.
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=serve, args=[self._loop], name=self._name, daemon=True
                )
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def before_fork(self) -> None:
        """Hold back new calls, wait for those under way, and close the loop."""
        self._is_held = self._lock.acquire(timeout=forks.PATIENCE)
        me = threading.get_ident()
        # A call that forks can't be waited for.
        mine = {self._thread and self._thread.ident, *self._callers}
        if not self._is_held or me in mine:
            return
        if not wait(tuple(self._calls), timeout=forks.PATIENCE).not_done:
            self._end()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            forks.inherited.append((self._loop, self._thread))
            self._loop = self._thread = None
            self._calls, self._callers = set(), set()
        if self._is_held:
            self._lock.release()
        elif in_child:
            self._lock = threading.Lock()


def serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop in a thread of its own until it is stopped, and close it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _end_tasks() -> None:
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
