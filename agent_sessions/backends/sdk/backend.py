"""SDKBackend: the items in a session class of the SDK or of others, owned by Django."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey, option_names
from agent_sessions.backends.options import ENCODE, is_address, is_misread
from agent_sessions.backends.remote.base import (
    RemoteBackend,
    Stretch,
    read_readable,
    translated,
)
from agent_sessions.backends.sdk.opening import Maker, Opened, OpenSessions, name_of
from agent_sessions.concurrency.loops import PerLoop
from agent_sessions.exceptions import InvalidBackend, StorageError
from agent_sessions.items import Batch, Item, decode_all

T = TypeVar("T")

# How many of the newest items a page is cut from.
WINDOW = 10_000
# Begins the ids of owned sessions, so no other id may begin with it.
_RESERVED = "agent_sessions."


def inner_id(key: SessionKey, namespace: str = "") -> str:
    """Return the id under which the inner class knows a session.

    Without an owner it is the session's own, so that existing histories open. No two
    keys have the same. `namespace` is the alias that wraps the backend.
    """
    if namespace:
        begin = f"{_RESERVED}in/{quote(namespace, safe='')}/"
        if key.user_id is None:
            return f"{begin}nobody/{key.session_id}"
        return f"{begin}user/{quote(str(key.user_id), safe='')}/{key.session_id}"
    if key.user_id is not None:
        return f"{_RESERVED}user/{quote(str(key.user_id), safe='')}/{key.session_id}"
    if key.session_id.startswith(_RESERVED):
        return f"{_RESERVED}nobody/{key.session_id}"
    return key.session_id


class SDKBackend(RemoteBackend):
    """Keeps items in any class that has the SDK's Session protocol.

    OPTIONS, besides those of all remote backends: `session`, the dotted path of the
    class or of a class method that makes one, and `keep`, how many sessions that
    nobody uses stay open. All others are its arguments; `arguments` is a dict of
    those whose names are taken.

    Every session lives in one event loop of the backend's own, whoever calls, because
    engines and clients belong to one.
    """

    tells_counts = False
    supports_loading = True
    required_options: ClassVar[frozenset[str]] = frozenset({"session"})
    check_id = "agent_sessions.E020"
    option_defaults: ClassVar[dict[str, Any]] = {
        **RemoteBackend.option_defaults,
        "keep": 32,
        "arguments": {},
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        super().__init__(alias, options, listed=listed)
        self._keep = self.read_whole("keep", 0)
        self._sessions: PerLoop[OpenSessions] = PerLoop(
            self.make_sessions, OpenSessions.aclose
        )

    def _check_option_names(self, options: dict[str, Any]) -> None:
        setting = f"AGENT_SESSIONS[{self.alias!r}]"
        if "session" not in options:
            super()._check_option_names({})
        target = options["session"]
        if not isinstance(target, str) and not callable(target):
            raise InvalidBackend(
                f"{setting}['OPTIONS']['session'] is no class.",
                hint="Give the dotted path of a class that has the SDK's Session "
                "protocol, or of a class method that makes one.",
                id="agent_sessions.E020",
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that are meant for the inner class."""
        own = option_names(type(self))
        given = {name: v for name, v in self.options.items() if name not in own}
        return {**given, **(self.options["arguments"] or {})}

    def make_sessions(self) -> OpenSessions:
        """Import the class, and see that it takes the arguments.

        Raises InvalidBackend. Only here, since importing the SDK takes seconds.
        """
        setting, own = f"AGENT_SESSIONS[{self.alias!r}]", option_names(type(self))
        maker = Maker(self.options["session"], self.arguments, setting, own)
        return OpenSessions(maker, self._keep)

    def load(self) -> None:
        """Import and check the class of its sessions. Raises InvalidBackend."""
        self.make_sessions()

    def check(self) -> list[checks.CheckMessage]:
        messages = super().check()
        setting = f"AGENT_SESSIONS[{self.alias!r}]['OPTIONS']"
        messages += [
            checks.Error(
                f"{setting}[{name!r}] has characters that are taken for something else.",
                hint=ENCODE,
                id="agent_sessions.E020",
            )
            for name, value in self.arguments.items()
            if is_address(value) and is_misread(value)
        ]
        if self._forgets():
            messages.append(
                checks.Warning(
                    f"{setting} keeps histories in the memory of one process.",
                    hint="Give the path of a file, or the address of a database.",
                    id="agent_sessions.W012",
                )
            )
        return messages

    def _forgets(self) -> bool:
        """Return whether the arguments name a database in memory."""
        given = self.arguments
        url = str(given.get("url", ""))
        if url.startswith("sqlite"):
            return url.endswith((":memory:", "://", ":///"))
        in_file = "SQLiteSession" in name_of(self.options["session"])
        default = ":memory:" if in_file else ""
        return str(given.get("db_path", default)) == ":memory:"

    # -- what a store implements -----------------------------------------------------

    async def store_append(self, key: SessionKey, batch: Batch) -> None:
        async def write(opened: Opened) -> None:
            # Copies: some classes keep what they are given.
            await opened.session.add_items(decode_all(row.data for row in batch.rows))

        await self._use(key, write, writes=True)

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        async def read(opened: Opened) -> list[Item]:
            # Some classes give their own lists away.
            return copy.deepcopy(await _latest(opened, limit))

        return await self._use(key, read)

    async def store_pop(self, key: SessionKey) -> Item | None:
        async def pop(opened: Opened) -> Item | None:
            item: Any = await opened.session.pop_item()
            while item is not None and not isinstance(item, dict):
                # Some classes take any JSON value for an item.
                item = await opened.session.pop_item()
            return item

        return await self._use(key, pop, writes=True)

    async def store_clear(self, key: SessionKey) -> int:
        async def clear(opened: Opened) -> int:
            count = len(await opened.session.get_items())
            await opened.session.clear_session()
            return count

        return await self._use(key, clear, writes=True)

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        items = await self._use(key, lambda opened: _latest(opened, WINDOW))
        page = wanted.cut(items)
        return page if len(items) < WINDOW else replace(page, total=None)

    # -- helpers ---------------------------------------------------------------------

    async def _use(
        self,
        key: SessionKey,
        work: Callable[[Opened], Awaitable[T]],
        *,
        writes: bool = False,
    ) -> T:
        """Do something with a key's session, in the loop that it belongs to.

        A run's lease is looked at when nobody else of this process uses the session any
        more, right before the write: no read of this process comes between.
        """
        fenced = writes and self.listed and key.fence is not None
        check = self._lease_check(key) if fenced else None
        return await self._background.arun(self._use_here(key, work, check))

    def _lease_check(self, key: SessionKey) -> Callable[[], Awaitable[None]]:
        caller = asyncio.get_running_loop()

        async def check() -> None:
            look = self.on_directory(self.directory.assert_lease, key)
            if asyncio.get_running_loop() is caller:
                await look
            else:
                # Where the caller is, whose transaction may hold the row.
                future = asyncio.run_coroutine_threadsafe(look, caller)
                await asyncio.wrap_future(future)

        return check

    async def _use_here(
        self,
        key: SessionKey,
        work: Callable[[Opened], Awaitable[T]],
        check: Callable[[], Awaitable[None]] | None,
    ) -> T:
        inner = inner_id(key, self.namespace + self.database_mark)
        with translated(self._failed):
            sessions = await self._sessions.get()
            async with sessions.use(inner) as opened:
                if check is not None:
                    await check()
                return await work(opened)

    def _failed(self, exc: Exception) -> StorageError:
        return StorageError(
            f"{name_of(self.options['session'])} of {self.alias!r} failed "
            f"({type(exc).__name__}). Look into what it stores in, and whether a write "
            "has arrived, before you try again."
        )


async def _latest(opened: Opened, limit: int | None) -> list[Item]:
    """Read the newest items; what is no dict doesn't count."""
    return await read_readable(
        opened.session.get_items,
        lambda item: item if isinstance(item, dict) else None,
        limit,
    )
