"""A write that its caller can't call back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

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
