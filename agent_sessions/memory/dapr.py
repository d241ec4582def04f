"""The session over a Dapr state store, usable without any setting."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.base import make_key
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.backends.loops import BackgroundLoop
from agent_sessions.memory.base import BackendSession
from agent_sessions.reports import guard_public_methods

if TYPE_CHECKING:
    from agents.memory import SessionSettings
    from dapr.aio.clients import DaprClient
    from dapr.clients import DaprClient as BlockingDaprClient

# One thread for the synchronous faces of all these sessions.
_background = BackgroundLoop("agent_sessions-dapr")


@guard_public_methods
class DaprSession(BackendSession):
    """A conversation in a Dapr state store: `DaprSession("user_123", "store", client)`.

    The client is the one of `dapr.aio.clients`, which serves the event loop that it was
    made in, or the one of `dapr.clients`, which runs in threads. It is not closed.
    `ttl` (a timedelta, "30d" or seconds) counts from the last write. A history that the
    SDK's DaprSession wrote is opened as it is.
    """

    def __init__(
        self,
        session_id: str,
        store_name: str,
        dapr_client: DaprClient | BlockingDaprClient,
        *,
        ttl: timedelta | str | int | None = None,
        consistency: str = "strong",
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        options = {
            "store_name": store_name,
            "client": dapr_client,
            "ttl": ttl,
            "consistency": consistency,
        }
        backend = DaprBackend("DaprSession", options, listed=False)
        backend.share_background(_background)
        super().__init__(
            backend, make_key(session_id, None), session_settings=session_settings
        )
