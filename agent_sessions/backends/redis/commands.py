"""What is sent to a client, one of ours or one that was handed in."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.redis.scripts import Script
from agent_sessions.exceptions import InvalidBackend, StorageError

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


class GivenClient:
    """A client that the caller made. It belongs to the loop that uses it first.

    Raises InvalidBackend for anything else than a client of redis.asyncio.
    """

    def __init__(self, client: Any) -> None:
        from redis.asyncio import Redis, RedisCluster

        if not isinstance(client, Redis | RedisCluster):
            raise InvalidBackend(
                f"The Redis client is a {type(client).__name__} of "
                f"{type(client).__module__}.",
                hint="Give a client of redis.asyncio, or use a URL or a cache.",
                id="agent_sessions.E021",
            )
        self._client = client
        self._begun = False
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        self._lock = asyncio.Lock()  # belongs to no loop before its first use

    async def in_this_loop(self) -> Redis | RedisCluster:
        """Return the client. Raises StorageError in another loop than its own."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = weakref.ref(loop)
        elif self._loop() is not loop:
            raise StorageError(
                "This Redis client belongs to the event loop that used it first. "
                "Make a client in each loop, or use from_url() or from_cache(), which "
                "do."
            )
        if is_cluster(self._client) and not self._begun:
            # One task alone: several that find a new client race in redis-py 8.
            async with self._lock:
                await self._client.initialize()
                self._begun = True
        return self._client


def is_cluster(client: Redis | RedisCluster) -> bool:
    from redis.asyncio import RedisCluster

    return isinstance(client, RedisCluster)


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
