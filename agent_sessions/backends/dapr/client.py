"""A client of the sidecar that begins without blocking the event loop."""

from __future__ import annotations

import asyncio
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent_sessions.backends.dapr.sidecar import TRIES, Unreachable
from agent_sessions.exceptions import StorageError

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
