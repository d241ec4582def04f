"""Calls that wait for the same thread, made together once it is free."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.settle import Answer, Outcome, tell
from agent_sessions.exceptions import StorageError
from agent_sessions.reports import clear, drop_frame

A = TypeVar("A")

# The error of each argument, in their order, or None.
Outcomes = Sequence[BaseException | None]
# Call a function with a connection and a context.
Within = Callable[[Callable[[], Outcomes]], Outcomes]
# Have a thread do some work, and then what the work returns.
Spawn = Callable[[Callable[[], Callable[[], None]]], object]


class Gathering(Generic[A]):
    """Arguments of one function, worked off as many at a time as there are.

    Each transaction of SQLite waits for the disk alone, and only one is open at a time:
    batches that wait for that thread cost no more together than one of them does.
    """

    def __init__(self, work: Callable[[Sequence[A]], Outcomes]) -> None:
        self._work = work
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = new_lock()
        self._waiting: list[tuple[A, asyncio.Future[None]]] = []
        # The loop that called for a thread last.
        self._loop: asyncio.AbstractEventLoop | None = None

    def join(self, argument: A, spawn: Spawn, within: Within) -> Outcome[None]:
        """Do the work on an argument in a thread, `within` a function.

        Needs a running loop. The thread is called once the loop has run what is ready
        now, which may read on that thread's connection and join too.
        """
        if self._pid != os.getpid():
            # A fork doesn't work off what its parent's threads do.
            self._reset()
        loop = asyncio.get_running_loop()
        future: Outcome[None] = Outcome(loop=loop)
        with self._lock:
            # Another loop may end before it calls.
            if not self._waiting or self._loop is not loop:
                self._loop = loop
                loop.call_soon(self._call_thread, spawn, within)
            self._waiting.append((argument, future))
        return future

    def _call_thread(self, spawn: Spawn, within: Within) -> None:
        try:
            spawn(partial(self._work_off, within))
        except RuntimeError as exc:
            # The threads were shut down meanwhile.
            _, futures = self._take()
            tell(_answers(futures, for_each(exc, len(futures))))

    def _take(self) -> tuple[list[A], list[asyncio.Future[None]]]:
        with self._lock:
            taken, self._waiting = self._waiting, []
        return [argument for argument, _ in taken], [future for _, future in taken]

    def _work_off(self, within: Within) -> Callable[[], None]:
        arguments, futures = self._take()
        outcomes: Outcomes = []
        try:
            if arguments:
                outcomes = within(partial(self._work, arguments))
        except BaseException as exc:
            drop_frame(exc)
            outcomes = for_each(exc, len(futures))
        for error in outcomes:
            if error is not None:
                # It came through frames that hold what others gave.
                clear(error)
        return partial(tell, _answers(futures, outcomes))


def _answers(futures: Sequence[asyncio.Future[None]], errors: Outcomes) -> list[Answer]:
    pairs = zip(futures, errors, strict=True)
    return [Answer(future, error=error) for future, error in pairs]


def for_each(error: BaseException, number: int) -> list[BaseException]:
    """Make an error of its own for each of several callers.

    One that all of them raise would gather the frames of each, and their contents.
    """
    return [error, *(_copy(error) for _ in range(number - 1))][:number]


def _copy(error: BaseException) -> BaseException:
    try:
        return copy.copy(error)
    except TypeError:
        # Its class takes other arguments than it keeps.
        return StorageError(str(error))
