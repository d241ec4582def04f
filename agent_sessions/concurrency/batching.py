"""Calls that wait for the same thread, made together once it is free."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from agent_sessions.concurrency.executor import Outcome, WarmExecutor, tell
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.exceptions import StorageError
from agent_sessions.reports import clear, drop_frame

A = TypeVar("A")

# What went wrong for each argument, in their order; None where nothing did.
Outcomes = Sequence[BaseException | None]


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

    def alone(self, argument: A) -> None:
        """Do the work on one argument here and now."""
        for error in self._work([argument]):
            if error is not None:
                raise error

    def join(
        self,
        argument: A,
        pool: WarmExecutor,
        within: Callable[[Callable[[], Outcomes]], Outcomes],
    ) -> Outcome[None]:
        """Have the work done on an argument in a thread of a pool, `within` a function.

        Needs a running loop. Raises RuntimeError where the pool has been shut down.
        """
        if self._pid != os.getpid():
            # What a parent's threads work off isn't a fork's.
            self._reset()
        future: Outcome[None] = Outcome(loop=asyncio.get_running_loop())
        with self._lock:
            if not self._waiting:
                pool.spawn(partial(self._work_off, within))
            self._waiting.append((argument, future))
        return future

    def _work_off(self, within: Callable[[Callable[[], Outcomes]], Outcomes]) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
        try:
            outcomes = within(partial(self._work, [argument for argument, _ in taken]))
        except BaseException as exc:
            drop_frame(exc)
            outcomes = for_each(exc, len(taken))
        for (_, future), error in zip(taken, outcomes, strict=True):
            if error is not None:
                # It came through frames that hold what others gave.
                clear(error)
            tell(future, None, error)


def for_each(error: BaseException, number: int) -> list[BaseException]:
    """Make an error of its own for each of several callers.

    One that all of them raise would gather the frames of each, and their contents.
    """
    return [error, *(_copy(error) for _ in range(number - 1))]


def _copy(error: BaseException) -> BaseException:
    try:
        return copy.copy(error)
    except TypeError:
        # Its class takes other arguments than it keeps.
        return StorageError(str(error))
