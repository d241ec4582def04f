"""How a caller learns the outcome of work that it can't call back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from agent_sessions.reports import clear, drop_frame

T = TypeVar("T")


async def settle(awaitable: Awaitable[T]) -> T:
    """Wait for a write's outcome even if the caller is cancelled meanwhile.

    The thread or server that writes can't be called back, so a cancelled caller is
    told only after the write has ended; a failure of the write wins over silence.
    """
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = cancelled or exc
    if cancelled is not None:
        # Looked at, so that a failed write isn't reported as never retrieved.
        task.cancelled() or task.exception()
        raise cancelled
    return task.result()


async def settle_or_undo(
    awaitable: Awaitable[T], undo: Callable[[T], Awaitable[object]]
) -> T:
    """Wait as settle() does; undo what was done for a caller that is cancelled."""
    task = asyncio.ensure_future(awaitable)
    try:
        return await settle(task)
    except asyncio.CancelledError:
        if not task.cancelled() and task.exception() is None:
            await settle(undo(task.result()))
        raise


class Outcome(asyncio.Future[T]):
    """A future that can't be cancelled, which spares the task that settle() needs."""

    def cancel(self, msg: Any | None = None) -> bool:
        """Do nothing; the task that asks remembers it until the outcome is there."""
        return False


class Answer(NamedTuple):
    """What a future is to be told by the thread that has done the work."""

    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None

    def give(self) -> None:
        if self.future.cancelled():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


def answered(
    call: Callable[[], Any], future: asyncio.Future[Any]
) -> Callable[[], None]:
    """Call, unless the future was cancelled. Return what tells the future."""
    if future.cancelled():
        return partial(tell, [])
    try:
        answer = Answer(future, call())
    except BaseException as exc:
        # The call holds what it was given, this frame the call.
        clear(exc)
        drop_frame(exc)
        answer = Answer(future, error=exc)
    return partial(tell, [answer])


def tell(answers: Iterable[Answer]) -> None:
    """Set outcomes from another thread; the futures of one loop go on together."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer.future.get_loop(), []).append(answer)
    for loop, found in by_loop.items():
        # Nobody is there any more if the loop was closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_give_all, found)


def _give_all(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.give()
