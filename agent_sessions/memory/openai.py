"""Sessions in OpenAI's Conversations service, as the SDK's Runner knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.memory import OpenAIConversationsSession as SDKConversationsSession

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.openai.backend import OpenAIConversationsBackend, Remote
from agent_sessions.backends.openai.client import Conversations, http_client
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.loops import HomeLoop
from agent_sessions.memory.base import BackendSession
from agent_sessions.reports import guard_public_methods

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from agent_sessions.memory.base import Settings


@guard_public_methods
class ConversationSession(BackendSession, SDKConversationsSession):  # type: ignore[misc]
    """A session of OpenAIConversationsBackend, for `Runner.run(..., session=session)`.

    It is one of the SDK's class, for which the Runner has rules of its own. Its
    `session_id` is ours; conversation_id() tells the service's.
    """

    backend: OpenAIConversationsBackend

    async def conversation_id(self) -> str | None:
        """Read the id of the remote conversation; None before the first item."""
        await self.backend.aadmit(self.key)
        found = await self.backend.find(self.key)
        return (found.id or None) if found else None

    # The SDK's own names for it, which its subclasses may call.

    async def _get_session_id(self) -> str:
        await self.backend.aadmit(self.key, write=True)
        return await self.backend.open(self.key)

    async def _clear_session_id(self) -> None:
        await self.backend.aadmit(self.key)
        await self.backend.forget(self.key)


@guard_public_methods
class OpenAIConversationsSession(ConversationSession):
    """One remote conversation, without any Django setting or database.

    `conversation_id` None makes a conversation with the first item, and so does the
    first item after a clear; `session_id` raises ValueError until then. The client
    is closed only if it was not given: `await session.close()`. `openai_client` is
    the SDK's name for it.
    """

    backend: _Standalone

    def __init__(
        self,
        conversation_id: str | None = None,
        client: AsyncOpenAI | None = None,
        *,
        openai_client: AsyncOpenAI | None = None,
        session_settings: Settings = None,
    ) -> None:
        if client is not None and openai_client is not None:
            raise TypeError("Give one of client and openai_client.")
        from openai import AsyncOpenAI

        given = client or openai_client
        if given is not None and not isinstance(given, AsyncOpenAI):
            raise TypeError(f"client is an AsyncOpenAI, not a {type(given).__name__}.")
        super().__init__(
            _Standalone(conversation_id, given),
            SessionKey("standalone"),
            session_settings=session_settings,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.backend.remote.id or 'not made yet'!r}>"

    @property
    def session_id(self) -> str:
        """The remote conversation's id. Raises ValueError before the first item."""
        name = self.backend.remote.id
        if not name:
            raise ValueError(
                "The conversation is not made yet. It gets its id with its first "
                "item: call add_items() first."
            )
        return name

    @session_id.setter
    def session_id(self, value: str) -> None:
        self.backend.remote = Remote(value)

    async def close(self) -> None:
        """Close the running loop's client, unless it was given."""
        await self.backend.aclose()


class _Standalone(OpenAIConversationsBackend):
    """One session's own backend: the remote id is kept here instead of on a row."""

    def __init__(self, name: str | None, client: AsyncOpenAI | None) -> None:
        super().__init__("standalone", {}, listed=False)
        self.remote = Remote(name or "")
        self._given = client
        self._home = HomeLoop()
        self._naming = new_lock()

    async def find(self, key: SessionKey) -> Remote | None:
        return self.remote

    async def swap(self, key: SessionKey, old: Remote, new: Remote) -> bool:
        with self._naming:
            if self.remote != old:
                return False
            self.remote = new
            return True

    async def make_client(self) -> Conversations:
        if self._given is None:
            return await super().make_client()
        if self._home.is_here():
            return Conversations(self._given)
        # Its connections belong to the loop of their first use.
        return Conversations(self._given.copy(http_client=http_client()))

    async def close_client(self, conversations: Conversations) -> None:
        if conversations.client is not self._given:
            await super().close_client(conversations)
