"""A pool of threads that gives work to the one that was at work last."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from agent_sessions.concurrency import forks
from agent_sessions.reports import clear, drop_frame

T = TypeVar("T")


class Outcome(asyncio.Future[T]):
    """A future that can't be cancelled: who awaits it learns what became of a write.

    A cancelled caller is told only after that, without a task to wait in its place.
    """

    def cancel(self, msg: Any | None = None) -> bool:
        """Do nothing; the task that asks remembers it until the outcome is there."""
        return False


class _Work(NamedTuple):
    """A call, and whom its outcome is for if it has one."""

    call: Callable[[], Any]
    future: asyncio.Future[Any] | None


class WarmExecutor:
    """A bounded pool of threads, of which few are used where few are needed.

    ThreadPoolExecutor goes round all of its threads. Each has a connection here, and
    a server process behind that, whose caches grow cold meanwhile: with eight threads
    a turn takes a fifth longer. And its outcomes reach a coroutine by way of two
    futures, which takes as long again as waking the thread. `put_away` is given the
    threads before a fork, while all are at rest.
    """

    def __init__(
        self,
        max_workers: int,
        thread_name_prefix: str = "",
        *,
        put_away: Callable[[Sequence[Lane]], None] | None = None,
    ) -> None:
        self._size = max_workers
        self._prefix = thread_name_prefix
        self._put_away = put_away
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []
        self._waiting: deque[_Work] = deque()
        self._ended = False
        forks.pools.add(self)

    def run(self, call: Callable[[], T], *, settles: bool = False) -> asyncio.Future[T]:
        """Call in the most recently used idle thread, else when one is free.

        Where the future is cancelled before that, it isn't called; one that `settles`
        can't be cancelled. Needs a running loop. Raises RuntimeError after a shutdown.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = (
            Outcome(loop=loop) if settles else loop.create_future()
        )
        self._take(_Work(call, future))
        return future

    def spawn(self, call: Callable[[], Callable[[], None]]) -> None:
        """Call as run() does. What it returns tells its outcome to who waits for it."""
        self._take(_Work(call, None))

    def _take(self, work: _Work) -> None:
        with self._lock:
            if self._ended:
                raise RuntimeError("This executor has been shut down.")
            if self._idle:
                self._idle.pop().inbox.put(work)
            elif len(self._lanes) < self._size:
                self._new_lane().inbox.put(work)
            else:
                self._waiting.append(work)

    def take_idle(self) -> Lane | None:
        """Keep an idle thread from working, until give_back(); None where none is idle.

        For a caller that works in its place.
        """
        with self._lock:
            return self._idle.pop() if self._idle else None

    def give_back(self, lane: Lane) -> None:
        """Let a thread work again that take_idle() gave."""
        if (work := self._next(lane)) is not None:
            lane.inbox.put(work)

    def shutdown(self, wait: bool = True) -> None:
        """Take no more work and finish what was taken."""
        if self._pid != os.getpid():
            # A fork has the parent's object, but not its threads.
            return
        with self._lock:
            self._ended = True
            idle, self._idle = self._idle, []
            lanes = tuple(self._lanes)
        atexit.unregister(self.shutdown)
        for lane in idle:
            lane.inbox.put(None)
        if wait:
            for lane in lanes:
                lane.join()

    def before_fork(self) -> None:
        """Let no call begin, and wait for those under way.

        SQLite's locks of an open transaction would be copied to the child for ever.
        """
        deadline = time.monotonic() + forks.PATIENCE
        mine = any(lane is threading.current_thread() for lane in self._lanes)
        while True:
            self._lock.acquire()
            # After a shutdown none is idle and none is left.
            alive = sum(lane.is_alive() for lane in self._lanes)
            at_rest = alive <= len(self._idle)
            if at_rest and self._put_away and self._pid == os.getpid():
                self._put_away(self._lanes)
            if at_rest or mine or time.monotonic() > deadline:
                return
            self._lock.release()
            time.sleep(0.001)

    def after_fork(self, *, in_child: bool) -> None:
        """Let calls begin again; the owner's pid tells a child to make threads anew."""
        self._lock.release()

    def _new_lane(self) -> Lane:
        if not self._lanes:
            # Threads that the interpreter joins by itself would have to end first.
            atexit.register(self.shutdown)
        lane = Lane(self._next, f"{self._prefix}-{len(self._lanes)}")
        self._lanes.append(lane)
        lane.start()
        return lane

    def _next(self, lane: Lane) -> _Work | None:
        """Hand what waits to a thread that has done its work, else let it rest."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            if self._ended:
                lane.inbox.put(None)
            else:
                self._idle.append(lane)
            return None


class Lane(threading.Thread):
    """One thread: works what lies in its inbox until that is None."""

    def __init__(self, following: Callable[[Lane], _Work | None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.inbox: SimpleQueue[_Work | None] = SimpleQueue()
        self._following = following

    def run(self) -> None:
        while (work := self.inbox.get()) is not None:
            while work is not None:
                work = self._do(work)

    def _do(self, work: _Work) -> _Work | None:
        result: Any = None
        error: BaseException | None = None
        if work.future is None or not work.future.cancelled():
            result, error = _outcome(work.call)
        # Before the caller is told, who may come back at once.
        following = self._following(self)
        if work.future is not None:
            tell(work.future, result, error)
        elif error is None:
            result()
        return following


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as exc:
        # The call holds what it was given, this frame the call.
        clear(exc)
        drop_frame(exc)
        return None, exc


def tell(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Set the outcome of a future from another thread than its loop's."""
    # Nobody is there any more where the loop has been closed.
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def tell_all(
    futures: Sequence[asyncio.Future[None]], errors: Sequence[BaseException | None]
) -> None:
    """Set the outcome of several futures; those of one loop go on together."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Any]] = {}
    for future, error in zip(futures, errors, strict=True):
        by_loop.setdefault(future.get_loop(), []).append((future, None, error))
    for loop, told in by_loop.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle_all, told)


def _settle_all(told: Sequence[tuple[asyncio.Future[Any], Any, Any]]) -> None:
    for each in told:
        _settle(*each)


def _settle(
    future: asyncio.Future[Any], result: Any, error: BaseException | None
) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
