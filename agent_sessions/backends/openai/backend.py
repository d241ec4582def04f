"""OpenAIConversationsBackend: items at OpenAI, the directory in a Django database."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.options import ENCODE, is_address, is_misread
from agent_sessions.backends.remote.base import RemoteBackend, Stretch
from agent_sessions.concurrency.loops import PerLoop
from agent_sessions.exceptions import HistoryGone, StorageError, StoreBusy
from agent_sessions.items import Batch, Item

if TYPE_CHECKING:
    from agent_sessions.backends.openai.client import Conversations

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# Hosts to which nothing need be encrypted.
_LOCAL = {"localhost", "127.0.0.1", "::1"}
# How often an operation begins again because the conversation was cleared under it.
_TRIES = 8


class Remote(NamedTuple):
    """What a row says of its remote conversation; the id is "" for none.

    `deleting` holds from the moment at which its deletion begins until that is known to
    have succeeded, so that a crash in between forgets nothing.
    """

    id: str = ""
    deleting: bool = False


NOTHING = Remote()


class OpenAIConversationsBackend(RemoteBackend):
    """Keeps items in OpenAI's Conversations service.

    A session's row holds the id of its remote conversation, which is made with the
    first item. Clearing deletes it there. OPTIONS, besides those of all remote
    backends: `api_key` (default: OPENAI_API_KEY from the environment), `base_url`,
    `organization`, `project`, `timeout` in seconds for one request, and
    `max_retries`, how often a read or a request refused with status 429 is repeated.
    """

    # Texts come back as parts, and items with ids.
    keeps_exactly = False
    tells_counts = False
    check_id = "agent_sessions.E018"
    # The API knows what items are, and refuses others.
    session_class = "agent_sessions.memory.openai.ConversationSession"
    option_defaults: ClassVar[dict[str, Any]] = {
        **RemoteBackend.option_defaults,
        "api_key": None,
        "base_url": None,
        "organization": None,
        "project": None,
        "timeout": 60,
        "max_retries": 2,
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        super().__init__(alias, options, listed=listed)
        self.keeps_marks = False
        self.read_seconds("timeout")
        self.read_whole("max_retries", 0)
        self._check_url()
        self._clients: PerLoop[Conversations] = PerLoop(
            self.make_client, self.close_client
        )

    def _check_url(self) -> None:
        url = self.options["base_url"]
        if url is None:
            return
        if is_address(url) and is_misread(url):
            raise self.invalid_option("base_url", ENCODE)
        parts = urlsplit(url) if is_address(url) else None
        if not (parts and parts.scheme in {"http", "https"} and parts.hostname):
            raise self.invalid_option(
                "base_url", 'Write it as "https://api.openai.com/v1".'
            )

    def check(self) -> list[checks.CheckMessage]:
        messages = super().check()
        api_key = self.options["api_key"] or os.environ.get("OPENAI_API_KEY")
        setting = f"AGENT_SESSIONS[{self.alias!r}]['OPTIONS']"
        if not api_key:
            messages.append(
                checks.Warning(
                    f"{setting} has no 'api_key', and OPENAI_API_KEY is not set.",
                    hint="Set OPENAI_API_KEY in the environment of the server; the key "
                    "needs the permission to write conversations.",
                    id="agent_sessions.W010",
                )
            )
        else:
            name = "the option api_key, or OPENAI_API_KEY,"
            messages += self.check_secret(name, api_key)
        url = urlsplit(self.options["base_url"] or "")
        if url.scheme == "http" and url.hostname not in _LOCAL:
            messages.append(
                checks.Warning(
                    f"{setting}['base_url'] is not encrypted: the API key and all "
                    "conversations can be read on the way.",
                    hint="Use https.",
                    id="agent_sessions.W010",
                )
            )
        return messages

    async def make_client(self) -> Conversations:
        from agent_sessions.backends.openai.client import Conversations, make_client

        return Conversations(make_client(self.options))

    async def close_client(self, conversations: Conversations) -> None:
        await conversations.client.close()

    async def aclose(self) -> None:
        """Close the running loop's client; the next use makes another."""
        await self._clients.aclose()

    # -- where the remote id is kept -------------------------------------------------

    async def find(self, key: SessionKey) -> Remote | None:
        """Read what the row says; None where there is no row."""
        rows = self.directory.rows(key).values_list("remote_id", "remote_deleting")
        row = await self.on_directory(rows.first)
        return None if row is None else Remote(*row)

    async def swap(self, key: SessionKey, old: Remote, new: Remote) -> bool:
        """Change the row's remote id. Return False if the old one is gone."""
        rows = self.directory.rows(key)
        rows = rows.filter(remote_id=old.id, remote_deleting=old.deleting)
        changed: int = await self.on_directory(
            rows.update, remote_id=new.id, remote_deleting=new.deleting
        )
        return changed == 1

    async def open(self, key: SessionKey) -> str:
        """Return the id of the key's conversation, which is made if need be."""
        for _ in range(_TRIES):
            found = await self.find(key)
            if found is None:
                # Deleted since it was admitted.
                await self.aadmit(key, write=True)
            elif found.deleting:
                # Whoever began it may have been killed.
                await self._finish_deletion(key, found.id)
            elif found.id:
                return found.id
            elif made := await self._make(key):
                return made
        raise _busy()

    async def _make(self, key: SessionKey) -> str | None:
        """Make a conversation; None where another process was faster."""
        conversations = await self._clients.get()
        made = await conversations.create()
        won = False
        try:
            won = await self.swap(key, NOTHING, Remote(made))
        finally:
            if not won:
                await self._drop(conversations, made)
        return made if won else None

    async def _drop(self, conversations: Conversations, made: str) -> None:
        """Delete a conversation that nobody has heard of."""
        try:
            await conversations.delete(made)
        except StorageError as exc:
            logger.warning(
                "An empty conversation of %r stays behind at OpenAI (%s)",
                self.alias,
                type(exc).__name__,
            )

    async def forget(self, key: SessionKey) -> None:
        """Take the conversation's id from the row, and leave the conversation."""
        if found := await self.find(key):
            await self.swap(key, found, NOTHING)

    # -- what a store implements -----------------------------------------------------

    async def store_append(self, key: SessionKey, batch: Batch) -> None:
        items = [row.data for row in batch.rows]
        await self._ask(key, lambda c, remote: c.add(remote, items), None, make=True)

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        return await self._ask(key, lambda c, remote: c.latest(remote, limit), [])

    async def store_pop(self, key: SessionKey) -> Item | None:
        return await self._ask(key, lambda c, remote: c.pop(remote), None)

    async def store_clear(self, key: SessionKey) -> int:
        for _ in range(_TRIES):
            found = await self.find(key)
            if not found or not found.id:
                return 0
            count = await self._count_of(found.id)
            if found.deleting or await self.swap(
                key, found, Remote(found.id, deleting=True)
            ):
                await self._finish_deletion(key, found.id)
                return count
        raise _busy()

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        if not remote_id:
            return 0
        count = await self._count_of(remote_id)
        await (await self._clients.get()).delete(remote_id)
        return count

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        nothing = Page([], has_earlier=False)
        return await self._ask(key, lambda c, remote: c.page(remote, wanted), nothing)

    # -- helpers ---------------------------------------------------------------------

    async def _ask(
        self,
        key: SessionKey,
        operation: Callable[[Conversations, str], Awaitable[T]],
        nothing: T,
        *,
        make: bool = False,
    ) -> T:
        """Ask about the key's conversation, again where it is cleared meanwhile.

        Return `nothing` where there is none, unless it is to be made. Raises
        HistoryGone where the row still names what OpenAI doesn't have.
        """
        for _ in range(_TRIES):
            found = Remote(await self.open(key)) if make else await self.find(key)
            if not found or not found.id:
                return nothing
            try:
                return await operation(await self._clients.get(), found.id)
            except HistoryGone:
                if await self.find(key) == found:
                    if found.deleting:
                        return nothing
                    raise
        raise _busy()

    async def _finish_deletion(self, key: SessionKey, remote: str) -> None:
        """Delete a conversation and forget its id, or name it as before."""
        deleting = Remote(remote, deleting=True)
        try:
            await (await self._clients.get()).delete(remote)
        except BaseException:
            await self.swap(key, deleting, Remote(remote))
            raise
        await self.swap(key, deleting, NOTHING)

    async def _count_of(self, remote: str) -> int:
        conversations = await self._clients.get()
        try:
            return len(await conversations.latest(remote, None))
        except HistoryGone:
            return 0


def _busy() -> StoreBusy:
    return StoreBusy(
        "The session is cleared again and again while it is used. Try again."
    )
