"""The session over a Dapr state store, usable without any setting."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, cast

from agent_sessions.backends.base import make_key
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.concurrency.loops import BackgroundLoop
from agent_sessions.memory.base import ClosableSession
from agent_sessions.reports import guard_public_methods

if TYPE_CHECKING:
    from dapr.aio.clients import DaprClient
    from dapr.clients import DaprClient as BlockingDaprClient

    from agent_sessions.memory.base import Settings

# One thread for the synchronous faces of all these sessions.
_background = BackgroundLoop("agent_sessions-dapr")


class Options(TypedDict, total=False):
    """What both ways of opening a DaprSession take."""

    ttl: timedelta | str | int | None
    consistency: str


@guard_public_methods
class DaprSession(ClosableSession):
    """A conversation in a Dapr state store: `DaprSession("user_123", "store", client)`.

    The client is the one of `dapr.aio.clients`, which serves the event loop that it was
    made in, or the one of `dapr.clients`, which runs in threads. It is not closed.
    `ttl` (a timedelta, "30d" or seconds) counts from the last write. A history that the
    SDK's DaprSession wrote is opened as it is, and its name of the second argument,
    `state_store_name`, is taken too.
    """

    def __init__(
        self,
        session_id: str,
        store_name: str | None = None,
        dapr_client: DaprClient | BlockingDaprClient | None = None,
        *,
        state_store_name: str | None = None,
        session_settings: Settings = None,
        **options: Unpack[Options],
    ) -> None:
        """Options are `ttl` and `consistency`, "strong" or "eventual"."""
        if dapr_client is None:
            raise TypeError("Give a dapr_client, or use DaprSession.from_address().")
        backend = _backend(
            _one_name(store_name, state_store_name), client=dapr_client, **options
        )
        backend.share_background(_background)
        super().__init__(
            backend, make_key(session_id, None), session_settings=session_settings
        )

    @classmethod
    def from_address(
        cls,
        session_id: str,
        *,
        store_name: str | None = None,
        state_store_name: str | None = None,
        dapr_address: str = "localhost:50001",
        session_settings: Settings = None,
        **options: Unpack[Options],
    ) -> Self:
        """Open a session on the sidecar at an address, with a client of its own.

        The client is made at the first use in each event loop; close() closes it.
        """
        backend = _backend(
            _one_name(store_name, state_store_name), address=dapr_address, **options
        )
        return cls.from_key(
            backend, make_key(session_id, None), session_settings=session_settings
        )

    def _owns_client(self) -> bool:
        return cast("DaprBackend", self.backend).options["client"] is None


def _one_name(ours: str | None, theirs: str | None) -> str:
    names = [name for name in (ours, theirs) if name is not None]
    if len(names) != 1:
        raise TypeError("Give one of store_name and state_store_name.")
    return names[0]


def _backend(store_name: str, **options: Any) -> DaprBackend:
    options["store_name"] = store_name
    return DaprBackend("DaprSession", options, listed=False)
