"""An executor that gives work to the thread that was at work last."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Work = tuple[Future[Any], Callable[[], Any]]


class WarmExecutor(Executor):
    """A bounded pool of threads, of which few are used where few are needed.

    ThreadPoolExecutor goes round all of its threads. Each has a connection here, and
    a server process behind that, whose caches grow cold meanwhile: with eight threads
    a turn takes a fifth longer.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str = "") -> None:
        self._size = max_workers
        self._prefix = thread_name_prefix
        self._lock = threading.Lock()
        # One thread each, which the interpreter ends properly when it exits.
        self._lanes: list[ThreadPoolExecutor] = []
        self._idle: list[ThreadPoolExecutor] = []
        self._waiting: deque[_Work] = deque()
        self._ended = False

    def submit(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Run a function in the most recently used idle thread, else when one is free."""
        future: Future[T] = Future()

        def call() -> T:
            return function(*args, **kwargs)

        with self._lock:
            if self._ended:
                raise RuntimeError("This executor has been shut down.")
            if self._idle:
                lane = self._idle.pop()
            elif len(self._lanes) < self._size:
                name = f"{self._prefix}-{len(self._lanes)}"
                lane = ThreadPoolExecutor(1, thread_name_prefix=name)
                self._lanes.append(lane)
            else:
                self._waiting.append((future, call))
                return future
            lane.submit(self._serve, lane, (future, call))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; finish what was taken, or cancel what hasn't begun."""
        with self._lock:
            self._ended = True
            if cancel_futures:
                while self._waiting:
                    self._waiting.popleft()[0].cancel()
            lanes = tuple(self._lanes)
        for lane in lanes:
            lane.shutdown(wait=wait)

    def _serve(self, lane: ThreadPoolExecutor, work: _Work) -> None:
        following: _Work | None = work
        while following is not None:
            future, call = following
            begun = future.set_running_or_notify_cancel()
            result, error = _outcome(call) if begun else (None, None)
            with self._lock:
                following = self._waiting.popleft() if self._waiting else None
                if following is None:
                    # Before its caller is told, who may come back at once.
                    self._idle.append(lane)
            if error is not None:
                future.set_exception(error)
            elif begun:
                future.set_result(result)


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as exc:
        return None, exc
