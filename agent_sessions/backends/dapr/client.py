"""A client of the sidecar that begins without blocking the event loop."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent_sessions.backends.dapr.sidecar import Unreachable
from agent_sessions.exceptions import MissingExtra, StorageError

if TYPE_CHECKING:
    from dapr.aio.clients import DaprClient

# After a sidecar's restart gRPC waits up to two minutes with its own defaults.
RECONNECT_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def require_dapr(feature: str) -> None:
    """Pass where the extra is installed. Raises MissingExtra that names it."""
    if find_spec("dapr") is None:
        raise MissingExtra(feature, "dapr")


async def open_client(address: str | None, health_timeout: float | None) -> DaprClient:
    """Make a client for the running loop, once the sidecar says that it is healthy.

    `address` is the sidecar's gRPC address, else what the DAPR_* variables say.
    `health_timeout` are seconds; None doesn't ask. Raises StorageError.
    """
    # It takes a moment to import, in which other tasks can go on.
    await asyncio.to_thread(import_module, "dapr.aio.clients")
    if health_timeout is not None:
        await _await_health(health_timeout)
    from dapr.clients.exceptions import DaprInternalError

    try:
        return _client_class()(address)
    except DaprInternalError:
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


@cache
def _client_class() -> type[DaprClient]:
    import grpc
    from dapr.aio.clients import DaprClient
    from dapr.aio.clients.grpc import interceptors as headers
    from dapr.clients.grpc._channel import resolve_grpc_endpoint
    from dapr.clients.retry import RetryPolicy
    from dapr.conf import settings
    from dapr.proto import api_service_v1

    class Client(DaprClient):
        """The package's client without the blocking health check of its start."""

        def __init__(self, address: str | None) -> None:
            # Does what the base does, but that: it would stop the loop for up to a
            # minute, and in a thread of its own the channel can't be made.
            self.retry_policy = RetryPolicy()
            self.invocation_client = None
            self._uri = resolve_grpc_endpoint(address)
            chain: list[Any] = [headers.DaprClientTimeoutInterceptorAsync()]
            if token := settings.DAPR_API_TOKEN:
                chain.append(
                    headers.DaprClientInterceptorAsync([("dapr-api-token", token)])
                )
            if self._uri.tls:
                self._channel = grpc.aio.secure_channel(
                    self._uri.endpoint,
                    self.get_credentials(),  # type: ignore[no-untyped-call]
                    options=RECONNECT_OPTIONS,
                    interceptors=chain,
                )
            else:
                self._channel = grpc.aio.insecure_channel(
                    self._uri.endpoint, RECONNECT_OPTIONS, interceptors=chain
                )
            self._stub = api_service_v1.DaprStub(  # type: ignore[no-untyped-call]
                self._channel
            )

    return Client
