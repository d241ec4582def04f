"""The rows of sessions whose items lie elsewhere: made, looked at, kept up to date."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, Error, IntegrityError, router

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.options import CONNECTION_OPTIONS, read_policy
from agent_sessions.concurrency.connections import (
    choosing,
    chosen_database,
    runs_in_its_thread,
)
from agent_sessions.concurrency.loops import with_caller
from agent_sessions.concurrency.threads import ThreadsByDatabase
from agent_sessions.exceptions import LeaseLost, SessionDoesNotExist
from agent_sessions.reports import as_storage_error
from agent_sessions.signals import session_cleared

if TYPE_CHECKING:
    # Imported late below: a session without a directory needs no Django settings.
    from agent_sessions.backends.directory import Directory, Seen
    from agent_sessions.concurrency.threads import DatabaseThreads

B = TypeVar("B", bound="ListedBackend")
P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")


def in_one_database(
    method: Callable[Concatenate[B, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[B, P], Coroutine[Any, Any, T]]:
    """Ask the router once for a coroutine, where its caller is."""

    @wraps(method)
    async def ask_once(self: B, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self.asks_router or chosen_database.get() is not None:
            return await method(self, *args, **kwargs)
        with choosing(await self.ask_router()):
            return await method(self, *args, **kwargs)

    return ask_once


class ListedBackend(BaseSessionBackend):
    """Base of backends whose sessions have rows in a Django database, but no items.

    Each use looks the row up, and each write brings it up to date. OPTIONS of all:
    `database`, the alias of DATABASES with the directory (default: the router's
    choice); `connections` and `prepare_connection`, which connections serve async
    callers, as of DatabaseBackend.
    """

    keeps_outside = True
    option_defaults: ClassVar[dict[str, Any]] = CONNECTION_OPTIONS

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        """Configure the backend; without `listed` it keeps no directory at all."""
        super().__init__(alias, options)
        self.listed = listed
        self.database: str | None = self.options["database"]
        self._pools = ThreadsByDatabase(read_policy(alias, self.options))

    @property
    def using(self) -> str:
        from agent_sessions.backends.directory import database_for

        return database_for(self.database)

    @property
    def asks_router(self) -> bool:
        """Whether a router says which database has the directory."""
        return self.listed and self.database is None

    async def ask_router(self) -> str:
        """Return its answer, from the thread in which it has one."""
        shared = self.options["connections"] == "request"
        if not shared or not router.routers or runs_in_its_thread():
            return self.using
        return await sync_to_async(lambda: self.using)()

    @property
    def database_mark(self) -> str:
        """What sets names in a store apart by the directory's database.

        It is "" for the default database and for one that the option names, so that
        names are the SDK's there. No alias of AGENT_SESSIONS ends in such a mark.
        """
        if not self.asks_router or (using := self.using) == DEFAULT_DB_ALIAS:
            return ""
        return f"\0{using}"

    @property
    def directory(self) -> Directory:
        from agent_sessions.backends.directory import Directory

        return Directory(self.alias, self.using)

    @property
    def threads(self) -> DatabaseThreads:
        return self._pools.of(self.using)

    async def on_directory(
        self, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        """Call a function that queries the directory, for a store's coroutine.

        It runs in the thread of a synchronous caller, whose transaction it sees, and
        in a thread of the database for everybody else.
        """
        call = partial(function, *args, **kwargs)
        served, result = await with_caller(call)
        return cast("T", result) if served else await self.threads.run(call)

    async def aadmit(self, key: SessionKey, *, write: bool = False) -> Seen | None:
        """Pass where the key's session is its own; a write makes the row.

        Return what the row said, if it was there. Raises SessionDoesNotExist for
        someone else's, LeaseLost, and StorageError where the directory's database
        fails.
        """
        if not self.listed:
            return None
        return await self.on_directory(self._admit, key, write=write)

    async def aenroll(
        self, key: SessionKey, read: Callable[[], Awaitable[Page]], *, asks: bool
    ) -> int:
        """Make the row of a key that has none. Return how many items lay there before.

        All who write make the row first, so nobody else adds these up. `read` returns a
        page with their total, and `asks` says that it is called.
        """
        if await self.aadmit(key) is not None or not self.listed:
            return 0
        before = (await read()).total if asks else None
        is_made = await self.aadmit(key, write=True) is None
        return before or 0 if is_made else 0

    def _admit(self, key: SessionKey, *, write: bool) -> Seen | None:
        with self._as_storage_error():
            seen = self.directory.look(key)
            if key.fence is not None:
                # Of a session that is somebody else's, or gone, nobody has a lease.
                if seen is None or seen.fence != key.fence:
                    raise LeaseLost
            elif seen is None:
                self._begin(key, write=write)
            return seen

    def _begin(self, key: SessionKey, *, write: bool) -> None:
        from agent_sessions.backends.remote.erasure import erase_before

        directory = self.directory
        directory.assert_own(key)
        erase_before(self, key)
        if write:
            try:
                directory.ensure(key)
            except IntegrityError:
                # Its owner has been deleted.
                raise SessionDoesNotExist(key.session_id) from None

    def _as_storage_error(self) -> AbstractContextManager[None]:
        return as_storage_error(self.using, "look up or change a session's row")

    async def _touch(
        self,
        key: SessionKey,
        count: int | None,
        added: int,
        title: str = "",
        *,
        adds_up: bool = True,
    ) -> None:
        """Bring the row up to date. The store has acknowledged the write already.

        `adds_up` tells that the row is right but for what was added.
        """
        if self.listed:
            touch = partial(self.directory.touch, key, added=added, title=title)
            await self.on_directory(self._update_row, key, touch, count, adds_up)

    def _update_row(
        self,
        key: SessionKey,
        touch: Callable[..., bool],
        count: int | None,
        adds_up: bool,
    ) -> None:
        from agent_sessions.backends.remote.erasure import erase_now, has_owner

        try:
            if touch(count=None if adds_up else count):
                return
            # It was deleted meanwhile, and gets its row again, unless its owner is gone
            # or a run wrote.
            if key.fence is None and has_owner(self.using, key):
                self.directory.ensure(key)
                touch(count=count)
                return
        except (IntegrityError, SessionDoesNotExist) as exc:
            self._warn("has got another owner", exc)
        except Error as exc:
            self._warn("could not be touched", exc)
            return
        erase_now(self, key.fenced(None))

    async def _correct(
        self, key: SessionKey, seen: Seen | None, count: int | None
    ) -> None:
        """Correct how many items a row tells of, unless it has changed meanwhile.

        A process may have been killed before it wrote that, and others may write.
        """
        if seen is not None and count not in {None, seen.item_count}:
            await self.on_directory(self._recount, key, seen, count)

    def _recount(self, key: SessionKey, seen: Seen, count: int) -> None:
        try:
            self.directory.recount(key, seen, count)
        except Error as exc:
            self._warn("could not be counted", exc)

    def _warn(self, what: str, exc: Exception) -> None:
        logger.warning(
            "The row of a session in %r %s (%s)", self.alias, what, type(exc).__name__
        )

    def _revoke_lease(self, key: SessionKey) -> None:
        """End a run's lease before its items go: it must not write between."""
        if key.fence is None:
            with self._as_storage_error():
                self.directory.revoke(key)

    def _cleared(self, key: SessionKey, count: int) -> None:
        with self._as_storage_error():
            self.directory.cleared(key)
        self.directory.announce(session_cleared, type(self), key, count=count)

    def close(self) -> None:
        self._pools.close()
