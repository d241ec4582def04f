"""What is sent to a client: scripts, writes that are done once, and scans."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.redis.clients import is_cluster
from agent_sessions.backends.redis.errors import CallTooLate, unanswered
from agent_sessions.backends.redis.scripts import SENDING_S, Script

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


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


async def evaluate(
    client: Redis | RedisCluster, script: Script, keys: Sequence[bytes], args: Any
) -> Any:
    """Run a script by its digest, and with its text where the server lacks it.

    Answers stay bytes, whatever the client decodes: some texts may be no UTF-8.
    """
    from redis.exceptions import NoScriptError

    rest = (len(keys), *keys, *args)
    try:
        return await client.execute_command(
            "EVALSHA", script.digest, *rest, NEVER_DECODE=True
        )
    except NoScriptError:
        return await client.execute_command(
            "EVAL", script.text, *rest, NEVER_DECODE=True
        )


async def scan(client: Any, match: bytes) -> AsyncIterator[bytes]:
    """Return the names that match, from every primary of a cluster."""
    targets: list[dict[str, Any]] = [{}]
    if is_cluster(client):
        targets = [{"target_nodes": node} for node in client.get_primaries()]
    for target in targets:
        cursor: Any = 0
        while True:
            found = await client.execute_command(
                *("SCAN", cursor, "MATCH", match, "COUNT", 1000, "TYPE", "list"),
                **target,
                NEVER_DECODE=True,
            )
            cursor, names = found
            if isinstance(cursor, dict):
                # A cluster's is told by the node's name.
                [cursor] = cursor.values()
            for name in names:
                yield name
            if not int(cursor):
                break
