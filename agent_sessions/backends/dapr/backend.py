"""The backend over a Dapr state store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.dapr.client import Client, open_client
from agent_sessions.backends.dapr.history import History
from agent_sessions.backends.dapr.reading import Rules
from agent_sessions.backends.dapr.records import head_key
from agent_sessions.backends.dapr.sidecar import Sidecar
from agent_sessions.backends.keys import Asking, anything
from agent_sessions.backends.options import ENCODE, is_address, is_misread
from agent_sessions.backends.remote.base import RemoteBackend, Stretch
from agent_sessions.concurrency.loops import BackgroundLoop, HomeLoop, PerLoop
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Batch, Item

CONSISTENCIES = ("strong", "eventual")
# A key that nobody writes: reading it tells whether the store answers.
_PING = "__ping__"


class DaprBackend(RemoteBackend):
    """Sessions in a state store of Dapr, through the sidecar's gRPC.

    OPTIONS: `store_name`, the state store's component; `address` of the sidecar
    (default: the DAPR_* variables) or a `client`, a DaprClient of either kind that is
    used and never closed; `ttl`, after which a session that nobody writes to is gone (a
    timedelta, "30d" or seconds); `consistency`, "strong" or "eventual"; `segment_size`,
    items in a record; `timeout` of a request and `health_timeout` of the sidecar's
    health check at the start (s; None leaves the check out).
    """

    supports_pop_if = True
    requires = "dapr"
    check_id = "agent_sessions.E017"
    required_options = frozenset({"store_name"})
    option_defaults: ClassVar[dict[str, Any]] = {
        **RemoteBackend.option_defaults,
        "address": None,
        "client": None,
        "ttl": None,
        "consistency": "strong",
        "segment_size": 32,
        "timeout": 10,
        "health_timeout": 5,
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        super().__init__(alias, options, listed=listed)
        self._check_values()
        self._home = HomeLoop()
        with suppress(RuntimeError):
            # An asyncio DaprClient is made in a loop, and given away there as a rule.
            self._home.is_here()
        self._knows_health_timeout = "health_timeout" in options
        ttl = self.read_ttl()
        self.trims = ttl is not None
        self._rules = Rules(
            self.read_whole("segment_size", 1, 1000),
            None if ttl is None else max(1, int(ttl.total_seconds())),
        )
        self._sidecars = PerLoop(
            self._make_sidecar, Sidecar.close, put_away=Sidecar.put_away
        )

    def _check_values(self) -> None:
        options = self.options
        if not isinstance(options["store_name"], str) or not options["store_name"]:
            raise self.invalid_option(
                "store_name", "Give the name of a Dapr state store."
            )
        if options["consistency"] not in CONSISTENCIES:
            raise self.invalid_option(
                "consistency", f"It is one of: {', '.join(CONSISTENCIES)}."
            )
        address = options["address"]
        if address is not None and (
            not isinstance(address, str)
            or is_misread(address if is_address(address) else f"dns://{address}")
        ):
            raise self.invalid_option("address", f"Write it as host:port. {ENCODE}")
        client = options["client"]
        if client is not None and not hasattr(client, "get_state"):
            raise self.invalid_option(
                "client", "Give a DaprClient of dapr.clients or dapr.aio.clients."
            )
        self.read_seconds("timeout")
        if options["health_timeout"] is not None:
            self.read_seconds("health_timeout")

    def check(self) -> list[checks.CheckMessage]:
        token = os.environ.get("DAPR_API_TOKEN") or None
        return [*super().check(), *self.check_secret("DAPR_API_TOKEN", token)]

    def share_background(self, background: BackgroundLoop) -> None:
        """Run coroutines for synchronous callers on a loop that other backends share."""
        self._background = background

    # -- the sidecar -----------------------------------------------------------------

    async def _make_sidecar(self) -> Sidecar:
        given = self.options["client"]
        opening = self._open_client if given is None else None
        sidecar = Sidecar(
            await self._open_client() if given is None else given,
            self.options["store_name"],
            consistency=self.options["consistency"],
            timeout=self.options["timeout"],
            open_client=opening,
        )
        if given is not None and not (sidecar.blocks or self._home.is_here()):
            # It would fail in ways that are hard to read.
            raise StorageError(
                "This DaprClient belongs to another event loop. Give the client of "
                "dapr.clients, which serves all loops and threads, or make one of "
                "dapr.aio.clients in each loop."
            )
        return sidecar

    async def _open_client(self) -> Client:
        seconds = self.options["health_timeout"]
        if not self._knows_health_timeout and os.environ.get("DAPR_HEALTH_TIMEOUT"):
            from dapr.conf import settings

            seconds = float(settings.DAPR_HEALTH_TIMEOUT)
        return await open_client(self.options["address"], seconds)

    async def ping(self) -> bool:
        """Return whether the sidecar and its store answer."""
        try:
            await (await self._sidecars.get()).read(_PING)
        except StorageError:
            return False
        return True

    async def disconnect(self) -> None:
        """Close the running loop's client, and that of synchronous callers."""
        await self._sidecars.aclose()
        # In a thread: it waits for that loop's end.
        await asyncio.to_thread(self.close)

    # -- storage ---------------------------------------------------------------------

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        async with self._writing(key) as history:
            return await history.append(batch)

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        return await (await self._open(key)).latest(limit)

    async def store_pop(self, key: SessionKey) -> Item | None:
        return await self.store_pop_if(key, anything)

    async def store_pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        async with self._writing(key) as history:
            return await history.pop(asking)

    async def store_clear(self, key: SessionKey) -> int:
        async with self._writing(key) as history:
            return await history.clear()

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        return await (await self._open(key)).page(wanted)

    @asynccontextmanager
    async def _writing(self, key: SessionKey) -> AsyncIterator[History]:
        """Open a history that nobody else of this loop changes meanwhile."""
        history = await self._open(key)
        async with history.sidecar.lock(history.key):
            yield history

    async def _open(self, key: SessionKey) -> History:
        async def admit() -> None:
            # After the head was read: whoever takes the lease and reads, writes or
            # clears changes the head, and then this is asked again.
            await self.on_directory(self.directory.assert_lease, key)

        sidecar = await self._sidecars.get()
        head = head_key(key, self.namespace + self.database_mark)
        if not self.listed or key.fence is None:
            return History(sidecar, head, self._rules)
        return History(sidecar, head, self._rules, admit, key.fence)
