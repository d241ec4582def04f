"""The rows of sessions whose items lie elsewhere: made, looked at, kept up to date."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    ParamSpec,
    TypeVar,
    cast,
)
from weakref import WeakSet

from asgiref.sync import sync_to_async
from django.db import (
    DEFAULT_DB_ALIAS,
    Error,
    IntegrityError,
    connections,
    router,
    transaction,
)

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.options import CONNECTION_OPTIONS, read_policy
from agent_sessions.backends.remote.directory_cache import DirectoryCache, PendingUpdate
from agent_sessions.concurrency.connections import (
    choosing,
    chosen_database,
    runs_in_its_thread,
)
from agent_sessions.concurrency.loops import with_caller
from agent_sessions.concurrency.settle import settle
from agent_sessions.concurrency.threads import ThreadsByDatabase
from agent_sessions.exceptions import SessionDoesNotExist
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


@dataclass(frozen=True, slots=True)
class Written:
    """What a store tells of a change: how many items the session has, if it knows."""

    count: int | None = None


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


# What is to be written down as the process ends, or to be forgotten with its database.
_backends: WeakSet[ListedBackend] = WeakSet()


class ListedBackend(BaseSessionBackend):
    """Base of backends whose sessions have rows in a Django database, but no items.

    OPTIONS of all: `database`, the alias of DATABASES with the directory (default:
    the router's choice); `connections` and `prepare_connection`, which connections
    serve async callers, as of DatabaseBackend; `touch_interval`, seconds for which a
    session's row is neither looked up nor written again (default 60; 0 does both at
    each use).
    """

    keeps_outside = True
    option_defaults: ClassVar[dict[str, Any]] = {
        **CONNECTION_OPTIONS,
        "touch_interval": 60,
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        """Configure the backend; without `listed` it keeps no directory at all."""
        super().__init__(alias, options)
        self.listed = listed
        self.database: str | None = self.options["database"]
        self._pools = ThreadsByDatabase(read_policy(alias, self.options))
        # By database: tenants may have the same ids and owners.
        self._caches: dict[str, DirectoryCache] = {}
        _backends.add(self)

    @property
    def using(self) -> str:
        """The alias of DATABASES that holds the directory."""
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
    def _known_rows(self) -> DirectoryCache:
        """What is remembered of the rows in this call's database."""
        using = self.using if self.listed else ""
        found = self._caches.get(using)
        if found is None:
            made = DirectoryCache(self.options["touch_interval"])
            found = self._caches.setdefault(using, made)
        return found

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

    def flush(self, key: SessionKey) -> None:
        """Update the session's row with what was written, if it is out of date."""
        if (update := self._known_rows.take(key)) is not None:
            self._write_update(key, update)

    @in_one_database
    async def aflush(self, key: SessionKey) -> None:
        """See flush()."""
        if (update := self._known_rows.take(key)) is not None:
            await settle(self.on_directory(self._write_update, key, update))

    async def aadmit(self, key: SessionKey, *, write: bool = False) -> Seen | None:
        """Check that the key's session is its own; a write makes the row.

        Return what the row says, if it was there and looked at. Raises
        SessionDoesNotExist for someone else's, LeaseLost, and StorageError where the
        directory's database fails.
        """
        # A run's lease is looked at each time.
        known = key.fence is None and self._known_rows.is_known(key)
        if not self.listed or known:
            return None
        return await self.on_directory(self._admit, key, write=write)

    def _admit(self, key: SessionKey, *, write: bool) -> Seen | None:
        with self._as_storage_error():
            return self._look_up(key, write=write)

    def _look_up(self, key: SessionKey, *, write: bool) -> Seen | None:
        directory, seen = self.directory, None
        if key.fence is not None:
            # Of a session that is somebody else's, or gone, nobody has a lease.
            directory.assert_lease(key)
        elif (seen := directory.look(key)) is None:
            from agent_sessions.backends.remote.erasure import erase_before

            directory.assert_own(key)
            erase_before(self, key)
            if not write:
                # Not remembered: the first write may be someone else's.
                return None
            try:
                directory.ensure(key)
            except IntegrityError:
                # Its owner has been deleted.
                raise SessionDoesNotExist(key.session_id) from None
        # What is rolled back, as after each test, is not remembered.
        transaction.on_commit(partial(self._remember, key), using=self.using)
        return seen

    def _as_storage_error(self) -> AbstractContextManager[None]:
        return as_storage_error(self.using, "look up or change a session's row")

    def _remember(self, key: SessionKey) -> None:
        known = self._known_rows
        known.database_name = connections[self.using].settings_dict["NAME"]
        for old, update in known.remember(key):
            self._write_update(old, update)

    async def _touch(self, key: SessionKey, written: Written, title: str = "") -> None:
        """Update the row if that is due. The items are written already."""
        if self.listed:
            update = self._known_rows.submit(key, PendingUpdate(written.count, title))
            if update is not None:
                await self.on_directory(self._write_update, key, update)

    def _write_update(self, key: SessionKey, update: PendingUpdate) -> None:
        """Write an update into the row. What the store acknowledged stays so."""
        try:
            if not self.directory.touch(key, count=update.count, title=update.title):
                self._known_rows.forget(key)
                self._restore_row(key, update)
        except Error as exc:
            self._known_rows.put_off(key, update)
            self._warn("could not be touched", exc)

    def _restore_row(self, key: SessionKey, update: PendingUpdate) -> None:
        """Make a row for what was written to a session that was deleted meanwhile.

        The items are erased where their owner is gone, or a run wrote them.
        """
        from agent_sessions.backends.remote.erasure import erase_now, has_owner

        try:
            if key.fence is None and has_owner(self.using, key):
                self.directory.ensure(key)
                self.directory.touch(key, count=update.count, title=update.title)
                return
        except (IntegrityError, SessionDoesNotExist) as exc:
            self._warn("has got another owner", exc)
        erase_now(self, key.fenced(None))

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
        self._known_rows.forget(key)
        with self._as_storage_error():
            self.directory.cleared(key)
        session_cleared.send(
            type(self),
            session_id=key.session_id,
            backend=self.alias,
            user_id=key.user_id,
            count=count,
        )

    def _recount(self, key: SessionKey, seen: Seen, count: int) -> None:
        try:
            self.directory.recount(key, seen, count)
        except Error as exc:
            self._warn("could not be counted", exc)

    def forget_rows(self, using: str) -> None:
        """Forget what is remembered of the rows of a database, which was emptied."""
        if (known := self._caches.get(using)) is not None:
            known.take_all()

    def write_at_exit(self) -> None:
        """Write what was put off, as the process ends."""
        if self.listed:
            for using, known in list(self._caches.items()):
                with choosing(using):
                    self._write_at_exit(using, known)

    def _write_at_exit(self, using: str, known: DirectoryCache) -> None:
        # No thread can be started any more, and no loop runs. Nothing is made anew: a
        # test's database may be gone, and its name be that of another one again.
        name = connections[using].settings_dict["NAME"]
        if known.is_inherited or name != known.database_name:
            return
        try:
            for key, update in known.take_all():
                self.directory.touch(key, count=update.count, title=update.title)
        except Error as exc:
            self._warn("could not be touched", exc)
        finally:
            connections[using].close()

    def close(self) -> None:
        for using, known in list(self._caches.items()):
            if updates := known.take_all():
                # In a thread: whoever closes may be in an event loop.
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(self._write_last, using, updates).result()
        self._pools.close()

    def _write_last(
        self, using: str, updates: list[tuple[SessionKey, PendingUpdate]]
    ) -> None:
        with choosing(using):
            try:
                for key, update in updates:
                    self._write_update(key, update)
            finally:
                connections[using].close()


def forget_rows(*, using: str, **kwargs: Any) -> None:
    """Follow a flush, as a TransactionTestCase does one after each test."""
    for backend in list(_backends):
        backend.forget_rows(using)


@atexit.register
def _write_at_exit() -> None:
    for backend in list(_backends):
        # Whatever is wrong by then, the process ends as it would.
        with suppress(Exception):
            backend.write_at_exit()
