"""What backends share whose items lie outside Django's databases.

The directory's row in a Django database still says whose a session is. A store only
implements the coroutines store_…(); the rest, with the synchronous faces, is here.
"""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from django.db import Error, IntegrityError, connections, router, transaction

from agent_sessions.backends.admissions import Admissions, News
from agent_sessions.backends.base import (
    BaseSessionBackend,
    Page,
    SessionKey,
    settle,
)
from agent_sessions.backends.loops import BackgroundLoop, take, with_caller
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.items import Batch, Item, encode_batch
from agent_sessions.signals import session_cleared

if TYPE_CHECKING:
    # Imported late below: a session without a directory needs no Django settings.
    from agent_sessions.backends.database.threads import DatabaseThreads
    from agent_sessions.backends.directory import Directory

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# Ids of one step of a listing.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Written:
    """What a store tells of a change: how many items the session has, if it knows."""

    count: int | None = None


class RemoteBackend(BaseSessionBackend):
    """Base of backends over other stores than Django's databases.

    OPTIONS of all: `database`, the alias of DATABASES with the directory (default:
    the router's choice); `touch_interval`, seconds for which a session's row is
    neither looked up nor written again (default 60; 0 does both at each use).
    """

    # Whether the store can tell which sessions it has; see store_ids().
    supports_listing: ClassVar[bool] = False
    option_defaults: ClassVar[dict[str, Any]] = {
        "database": None,
        "touch_interval": 60,
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        """Configure the backend; without `listed` it keeps no directory at all."""
        super().__init__(alias, options)
        self.listed = listed
        self.database: str | None = self.options["database"]
        self._threads: DatabaseThreads | None = None
        self._background = BackgroundLoop(f"agent_sessions-{alias}")
        self._admissions = Admissions(self.options["touch_interval"])
        self._lock = threading.Lock()

    # -- what a store implements -----------------------------------------------------

    @abstractmethod
    async def store_append(self, key: SessionKey, batch: Batch) -> Written:
        """Store a batch whole, contiguous and in order, or not at all."""

    @abstractmethod
    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """Read the newest `limit` (1 or more) readable items, oldest first."""

    @abstractmethod
    async def store_pop(self, key: SessionKey) -> tuple[Item | None, Written]:
        """Remove and return the newest readable item."""

    @abstractmethod
    async def store_clear(self, key: SessionKey) -> int:
        """Remove every item; tell how many there were. Nothing there is no error."""

    @abstractmethod
    async def store_page(
        self, key: SessionKey, *, before: int | None, after: int | None, limit: int
    ) -> Page:
        """Read up to `limit` items around a position; see page()."""

    def store_ids(self) -> AsyncIterator[str]:
        """Give the ids of the sessions without an owner that the store has.

        Only where `supports_listing` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} can't list its sessions.")

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        """Remove the items of a session whose row is gone; `remote_id` was its own."""
        return await self.store_clear(key)

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if not items:
            return
        batch = encode_batch(items)
        self._admit(key, write=True)
        written = self._await(self.store_append(key, batch))
        self._touch(key, written, batch.title)

    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        self._admit(key)
        return [] if limit == 0 else self._await(self.store_latest(key, limit))

    def pop(self, key: SessionKey) -> Item | None:
        self._admit(key)
        item, written = self._await(self.store_pop(key))
        if item is not None:
            self._touch(key, written)
        return item

    def clear(self, key: SessionKey) -> int:
        self._admit(key)
        self._begin_clear(key)
        count = self._await(self.store_clear(key))
        self._cleared(key, count)
        return count

    def page(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        self._admit(key)
        page = self._await(
            self.store_page(key, before=before, after=after, limit=limit)
        )
        self.flush(key)
        return page

    def erase(self, key: SessionKey, remote_id: str = "") -> int:
        self._admissions.forget(key)
        return self._await(self.store_erase(key, remote_id))

    def list_ids(self) -> Iterator[str]:
        """Give the ids of the sessions without an owner that the store has.

        Also those that have no row. Raises NotImplementedError where the store can't
        tell, see `supports_listing`.
        """
        ids = self.store_ids()
        while chunk := self._await(take(ids, _CHUNK)):
            yield from chunk

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._background.run(coroutine)

    # -- async -------------------------------------------------------------------

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            batch = encode_batch(items)
            await self._aadmit(key, write=True)
            await settle(self._append(key, batch))

    async def _append(self, key: SessionKey, batch: Batch) -> None:
        written = await self.store_append(key, batch)
        await self._atouch(key, written, batch.title)

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        await self._aadmit(key)
        return [] if limit == 0 else await self.store_latest(key, limit)

    async def apop(self, key: SessionKey) -> Item | None:
        await self._aadmit(key)
        return await settle(self._pop(key))

    async def _pop(self, key: SessionKey) -> Item | None:
        item, written = await self.store_pop(key)
        if item is not None:
            await self._atouch(key, written)
        return item

    async def aclear(self, key: SessionKey) -> int:
        await self._aadmit(key)
        return await settle(self._clear(key))

    async def _clear(self, key: SessionKey) -> int:
        if self.listed:
            await self.threads.run(self._begin_clear, key)
        count = await self.store_clear(key)
        if self.listed:
            await self.threads.run(self._cleared, key, count)
        return count

    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        await self._aadmit(key)
        page = await self.store_page(key, before=before, after=after, limit=limit)
        await self.aflush(key)
        return page

    # -- the directory ---------------------------------------------------------------

    @property
    def using(self) -> str:
        """The alias of DATABASES that holds the directory."""
        from agent_sessions.models import AgentSession

        return self.database or router.db_for_write(AgentSession)

    @property
    def directory(self) -> Directory:
        from agent_sessions.backends.directory import Directory

        return Directory(self.alias, self.using)

    @property
    def threads(self) -> DatabaseThreads:
        from agent_sessions.backends.database.threads import DatabaseThreads

        using = self.using
        with self._lock:
            if self._threads is None or self._threads.database != using:
                size = 1 if connections[using].vendor == "sqlite" else 8
                self._threads = DatabaseThreads(using, size)
            return self._threads

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

    @property
    def keeps_outside(self) -> bool:
        return True

    def enroll(self, key: SessionKey) -> None:
        from agent_sessions.backends.leftovers import erase_before

        if not self.directory.rows(key).exists():
            erase_before(self, key)
        super().enroll(key)

    def flush(self, key: SessionKey) -> None:
        if (news := self._admissions.take(key)) is not None:
            self._write_down(key, news)

    async def aflush(self, key: SessionKey) -> None:
        if (news := self._admissions.take(key)) is not None:
            await settle(self.threads.run(self._write_down, key, news))

    def _is_known(self, key: SessionKey) -> bool:
        # A run's lease is looked at each time.
        return not self.listed or (key.fence is None and self._admissions.is_known(key))

    def _admit(self, key: SessionKey, *, write: bool = False) -> None:
        """Pass where the key's session is its own; a write makes the row.

        Raises SessionDoesNotExist for someone else's, and LeaseLost.
        """
        if self._is_known(key):
            return
        directory = self.directory
        if key.fence is not None:
            # Of a session that is somebody else's, or gone, nobody has a lease.
            directory.assert_lease(key)
        elif not directory.rows(key).exists():
            from agent_sessions.backends.leftovers import erase_before

            directory.assert_own(key)
            erase_before(self, key)
            if not write:
                # Not remembered: the first write may be someone else's.
                return
            try:
                directory.ensure(key)
            except IntegrityError:
                # Its owner has been deleted.
                raise SessionDoesNotExist(key.session_id) from None
        # What is rolled back, as after each test, is not remembered.
        transaction.on_commit(partial(self._remember, key), using=self.using)

    async def _aadmit(self, key: SessionKey, *, write: bool = False) -> None:
        if not self._is_known(key):
            await self.threads.run(self._admit, key, write=write)

    def _remember(self, key: SessionKey) -> None:
        for pushed, news in self._admissions.remember(key):
            self._write_down(pushed, news)

    def _touch(self, key: SessionKey, written: Written, title: str = "") -> None:
        """Bring the row up to date, if that is due. The items are written already."""
        if self.listed:
            news = self._admissions.tell(key, News(written.count, title))
            if news is not None:
                self._write_down(key, news)

    async def _atouch(self, key: SessionKey, written: Written, title: str = "") -> None:
        if self.listed:
            news = self._admissions.tell(key, News(written.count, title))
            if news is not None:
                await self.threads.run(self._write_down, key, news)

    def _write_down(self, key: SessionKey, news: News) -> None:
        """Write what is new into the row. What the store acknowledged stays so."""
        try:
            if not self.directory.touch(key, count=news.count, title=news.title):
                self._admissions.forget(key)
                self._rescue(key, news)
        except Error as exc:
            self._admissions.put_off(key, news)
            self._warn("could not be touched", exc)

    def _rescue(self, key: SessionKey, news: News) -> None:
        """Make a row for what was written to a session that was deleted meanwhile.

        Where its owner is gone, or a run wrote, it goes the way of the session.
        """
        from agent_sessions.backends.leftovers import erase_now, has_owner

        try:
            if key.fence is None and has_owner(self.using, key):
                self.directory.ensure(key)
                self.directory.touch(key, count=news.count, title=news.title)
                return
        except (IntegrityError, SessionDoesNotExist) as exc:
            self._warn("has got another owner", exc)
        erase_now(self, key.fenced(None))

    def _warn(self, what: str, exc: Exception) -> None:
        logger.warning(
            "The row of a session in %r %s (%s)", self.alias, what, type(exc).__name__
        )

    def _begin_clear(self, key: SessionKey) -> None:
        """End a run's lease before its items go: it must not write between."""
        if self.listed and key.fence is None:
            self.directory.revoke(key)

    def _cleared(self, key: SessionKey, count: int) -> None:
        if not self.listed:
            return
        self._admissions.forget(key)
        self.directory.cleared(key)
        session_cleared.send(
            type(self),
            session_id=key.session_id,
            backend=self.alias,
            user_id=key.user_id,
            count=count,
        )

    def close(self) -> None:
        if news := self._admissions.take_all():
            # In a thread: whoever closes may be in an event loop.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._write_all, news).result()
        self._background.close()
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.close()

    def _write_all(self, all_news: list[tuple[SessionKey, News]]) -> None:
        try:
            for key, news in all_news:
                self._write_down(key, news)
        finally:
            connections[self.using].close()
