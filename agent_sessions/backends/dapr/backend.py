"""The backend over a Dapr state store, and a client that begins without blocking."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.dapr.history import History
from agent_sessions.backends.dapr.reading import Rules
from agent_sessions.backends.dapr.records import head_key
from agent_sessions.backends.dapr.sidecar import TRIES, Sidecar, Unreachable
from agent_sessions.backends.keys import Asking, anything
from agent_sessions.backends.options import ENCODE, is_address, is_misread
from agent_sessions.backends.remote.base import RemoteBackend, Stretch
from agent_sessions.concurrency.loops import BackgroundLoop, HomeLoop, PerLoop
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Batch, Item

if TYPE_CHECKING:
    import grpc

# After a sidecar's restart gRPC waits up to two minutes with its own defaults.
RECONNECT_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]

# What gRPC takes in one message unless it is told otherwise.
INBOUND_BYTES = 4 * 1024 * 1024
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


# -- the client ----------------------------------------------------------------------


async def open_client(address: str | None, health_timeout: float | None) -> Client:
    """Make a client for the running loop, once the sidecar says that it is healthy.

    `address` is the sidecar's gRPC address, else what the DAPR_* variables say.
    `health_timeout` are seconds; None doesn't ask. Raises StorageError.
    """
    # It takes a moment to import, in which other tasks can go on.
    await asyncio.to_thread(import_module, "dapr.aio.clients")
    if health_timeout is not None:
        await _await_health(health_timeout)
    try:
        return Client(address)
    except ValueError:
        raise StorageError(
            "The address of the Dapr sidecar can't be read. Write it as host:port, in "
            "the option address or in DAPR_GRPC_ENDPOINT."
        ) from None


async def _await_health(seconds: float) -> None:
    from dapr.aio.clients.health import DaprHealth
    from dapr.clients.http.helpers import get_api_url

    try:
        async with asyncio.timeout(seconds):
            await DaprHealth.wait_for_sidecar()  # type: ignore[no-untyped-call]
    except TimeoutError:
        server = urlsplit(get_api_url())
        raise Unreachable(
            "The Dapr sidecar did not answer its health check at "
            f"{server.scheme}://{server.netloc.rpartition('@')[2]} "
            f"within {seconds:g} s. Start it, set DAPR_HTTP_PORT or "
            "DAPR_HTTP_ENDPOINT, or turn the check off with health_timeout=None."
        ) from None


class Client:
    """What is asked of a state store, through the sidecar's own protocol.

    The package's asyncio client asks for the sidecar's health with a blocking request
    when it is made, takes no options for its channel, and sends a save again of which
    it can't know whether it arrived. The methods are those of it that are used here.
    """

    def __init__(self, address: str | None) -> None:
        """Connect to the sidecar. Raises ValueError where the address is none."""
        from dapr.conf import settings
        from dapr.proto import api_service_v1

        self.channel = _channel(address)
        self._stub: Any = api_service_v1.DaprStub(  # type: ignore[no-untyped-call]
            self.channel
        )
        # Of a record that an answer can carry, beside what goes with it.
        most = settings.DAPR_GRPC_MAX_INBOUND_MESSAGE_SIZE_BYTES or INBOUND_BYTES
        self.most_bytes = most - 1024
        # How often a read is tried; -1 means for ever, as the package reads it.
        tries = settings.DAPR_API_MAX_RETRIES
        self.tries = inf if tries < 0 else max(TRIES, tries)
        seconds = settings.DAPR_API_TIMEOUT_SECONDS
        token = settings.DAPR_API_TOKEN
        self._given = {
            "timeout": float(seconds) if seconds else None,
            "metadata": [("dapr-api-token", token)] if token else None,
        }

    async def close(self) -> None:
        await self.channel.close()

    async def get_state(self, *, state_metadata: dict[str, str], **named: Any) -> Any:
        return await self._ask("GetState", metadata=state_metadata, **named)

    async def get_bulk_state(
        self, *, states_metadata: dict[str, str], **named: Any
    ) -> Any:
        return await self._ask("GetBulkState", metadata=states_metadata, **named)

    async def save_state(
        self,
        *,
        store_name: str,
        etag: str | None,
        options: Any,
        state_metadata: dict[str, str],
        **named: Any,
    ) -> None:
        from dapr.proto import common_v1

        given = {} if etag is None else {"etag": common_v1.Etag(value=etag)}
        state = common_v1.StateItem(
            metadata=state_metadata, options=options.get_proto(), **given, **named
        )
        await self._ask("SaveState", store_name=store_name, states=[state])

    async def delete_state(self, **named: Any) -> None:
        await self._ask("DeleteState", **named)

    async def _ask(self, name: str, **fields: Any) -> Any:
        from dapr.proto import api_v1

        request = getattr(api_v1, f"{name}Request")(**fields)
        return await getattr(self._stub, name)(request, **self._given)


def _channel(address: str | None) -> grpc.aio.Channel:
    import grpc
    from dapr.conf import settings
    from dapr.conf.helpers import GrpcEndpoint

    host = f"{settings.DAPR_RUNTIME_HOST}:{settings.DAPR_GRPC_PORT}"
    endpoint = GrpcEndpoint(address or settings.DAPR_GRPC_ENDPOINT or host)
    options: list[tuple[str, Any]] = [*RECONNECT_OPTIONS]
    if most := settings.DAPR_GRPC_MAX_INBOUND_MESSAGE_SIZE_BYTES:
        options.append(("grpc.max_receive_message_length", most))
    if endpoint.tls:
        return grpc.aio.secure_channel(
            endpoint.endpoint, grpc.ssl_channel_credentials(), options=options
        )
    return grpc.aio.insecure_channel(endpoint.endpoint, options=options)
