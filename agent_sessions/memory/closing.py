"""Sessions that can be closed, as the SDK's over Redis and Dapr can."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from agent_sessions.exceptions import SessionClosed
from agent_sessions.memory.base import BackendSession

if TYPE_CHECKING:
    from agents.run_context import RunContextWrapper


class ClosableSession(BackendSession):
    """A session that close() ends, unless its client was given to it.

    As the SDK's: a client that is the caller's stays open, and then the session stays
    usable. Closing twice is no error.
    """

    _closed = False

    async def close(self) -> None:
        """Let go of connections; every later call raises SessionClosed.

        Where it fails, the session has ended all the same, and closing again goes on.
        """
        if self._owns_client():
            self._closed = True
            await self._release()

    async def ping(self) -> bool:
        """Return whether the store answers. Raises SessionClosed."""
        self.assert_usable()
        return await self._ping()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def assert_usable(self) -> None:
        """Raise SessionClosed after close()."""
        if self._closed:
            raise SessionClosed(type(self).__name__)

    async def _admit(self, wrapper: RunContextWrapper[Any] | None) -> None:
        self.assert_usable()
        await super()._admit(wrapper)

    def _owns_client(self) -> bool:
        """Return whether nobody but our own code has the client."""
        raise NotImplementedError

    async def _release(self) -> None:
        """Close what can be closed; once more is no error."""
        raise NotImplementedError

    async def _ping(self) -> bool:
        raise NotImplementedError
