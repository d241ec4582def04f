"""Writes that are done once, however often and however late they arrive."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from agent_sessions.backends.redis.errors import CallTooLate, unanswered
from agent_sessions.backends.redis.scripts import SENDING_S

_TOKEN_BYTES = 8

# Sends a script with a call's token and time.
_Send = Callable[[tuple[bytes, int]], Awaitable[Any]]


class Calls:
    """The writes of one backend. What the scripts promise stands in scripts.py."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        # How far the server's clock is ahead of this one. The server has the last word.
        self.ahead_ms = 0

    async def make(self, send: _Send, *, pops: bool = False) -> Any:
        """Send a call until it is answered.

        Raises StoreUnavailable where the server doesn't answer in time.
        """
        try:
            return await self._make(send, pops)
        except CallTooLate as exc:
            # The clocks differ. None of its tries was done, so another call may be.
            self.ahead_ms = exc.server_ms - _now_ms()
            return await self._make(send, pops)

    async def _make(self, send: _Send, pops: bool) -> Any:
        token = (b"p" if pops else b"w") + os.urandom(_TOKEN_BYTES)
        try:
            async with asyncio.timeout(SENDING_S):
                return await send((token, _now_ms() + self.ahead_ms))
        except TimeoutError as exc:
            raise unanswered(self.alias, SENDING_S) from exc


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
