"""What backends share whose items lie outside Django's databases.

The directory's row in a Django database still says whose a session is. A store only
implements the six coroutines; the rest, with the synchronous faces, is here.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar, cast

from django.db import DatabaseError, connections, router

from agent_sessions.backends.base import (
    BaseSessionBackend,
    Page,
    SessionKey,
    settle,
)
from agent_sessions.backends.database.threads import DatabaseThreads
from agent_sessions.backends.directory import Directory
from agent_sessions.backends.loops import BackgroundLoop, with_caller
from agent_sessions.items import Batch, Item, encode_batch
from agent_sessions.models import AgentSession
from agent_sessions.signals import session_cleared

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# How many sessions' admissions a process remembers.
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Written:
    """What a store tells of a change: how many items the session has, if it knows."""

    count: int | None = None


@dataclass(slots=True)
class _Admission:
    """That a key's row was found or made, and when its row was last written."""

    user_id: Any
    checked: float
    touched: float | None = None


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
        self._admissions: OrderedDict[str, _Admission] = OrderedDict()
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
        """Remove every item; tell how many there were."""

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

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if not items:
            return
        batch = encode_batch(items)
        self._admit(key, write=True)
        written = self._background.run(self.store_append(key, batch))
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
        return self._await(
            self.store_page(key, before=before, after=after, limit=limit)
        )

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
        await self._if_due(key, self._touch, key, written, batch.title)

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        await self._aadmit(key)
        return [] if limit == 0 else await self.store_latest(key, limit)

    async def apop(self, key: SessionKey) -> Item | None:
        await self._aadmit(key)
        return await settle(self._pop(key))

    async def _pop(self, key: SessionKey) -> Item | None:
        item, written = await self.store_pop(key)
        if item is not None:
            await self._if_due(key, self._touch, key, written)
        return item

    async def aclear(self, key: SessionKey) -> int:
        await self._aadmit(key)
        return await settle(self._clear(key))

    async def _clear(self, key: SessionKey) -> int:
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
        return await self.store_page(key, before=before, after=after, limit=limit)

    # -- the directory ---------------------------------------------------------------

    @property
    def using(self) -> str:
        """The alias of DATABASES that holds the directory."""
        return self.database or router.db_for_write(AgentSession)

    @property
    def directory(self) -> Directory:
        return Directory(self.alias, self.using)

    @property
    def threads(self) -> DatabaseThreads:
        if self._threads is None or self._threads.database != self.using:
            size = 1 if connections[self.using].vendor == "sqlite" else 8
            self._threads = DatabaseThreads(self.using, size)
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

    def _is_known(self, key: SessionKey) -> bool:
        """Tell whether the key's row was looked at a short while ago."""
        if not self.listed:
            return True
        if key.fence is not None:
            return False
        with self._lock:
            admission = self._admissions.get(key.session_id)
            return (
                admission is not None
                and admission.user_id == key.user_id
                and self._is_fresh(admission.checked)
            )

    def _is_fresh(self, moment: float) -> bool:
        interval: float = self.options["touch_interval"]
        return time.monotonic() - moment < interval

    def _admit(self, key: SessionKey, *, write: bool = False) -> None:
        """Pass where the key's session is its own; a write makes the row.

        Raises SessionDoesNotExist for someone else's, and LeaseLost.
        """
        if self._is_known(key):
            return
        directory = self.directory
        if key.fence is not None:
            directory.assert_own(key)
            directory.assert_lease(key)
        elif write:
            directory.ensure(key)
        elif not directory.rows(key).exists():
            # Not remembered: the first write may be someone else's.
            directory.assert_own(key)
            return
        self._remember(key)

    def _remember(self, key: SessionKey) -> None:
        with self._lock:
            old = self._admissions.pop(key.session_id, None)
            touched = old.touched if old and old.user_id == key.user_id else None
            self._admissions[key.session_id] = _Admission(
                key.user_id, time.monotonic(), touched
            )
            while len(self._admissions) > _REMEMBERED:
                self._admissions.popitem(last=False)

    async def _aadmit(self, key: SessionKey, *, write: bool = False) -> None:
        if not self._is_known(key):
            await self.threads.run(self._admit, key, write=write)

    async def _if_due(
        self, key: SessionKey, touch: Callable[..., None], *args: Any
    ) -> None:
        if self._touch_is_due(key):
            await self.threads.run(touch, *args)

    def _touch_is_due(self, key: SessionKey) -> bool:
        if not self.listed:
            return False
        with self._lock:
            admission = self._admissions.get(key.session_id)
            touched = None if admission is None else admission.touched
            return touched is None or not self._is_fresh(touched)

    def _touch(self, key: SessionKey, written: Written, title: str = "") -> None:
        """Bring the row up to date, if that is due. The items are written already."""
        if not self._touch_is_due(key):
            return
        try:
            self.directory.touch(key, count=written.count, title=title)
        except DatabaseError as exc:
            # What the store acknowledged must not look as if it had failed.
            logger.warning(
                "The row of a session in %r could not be touched (%s)",
                self.alias,
                type(exc).__name__,
            )
            return
        with self._lock:
            if admission := self._admissions.get(key.session_id):
                admission.touched = time.monotonic()

    def _cleared(self, key: SessionKey, count: int) -> None:
        if not self.listed:
            return
        self.directory.cleared(key)
        with self._lock:
            self._admissions.pop(key.session_id, None)
        session_cleared.send(
            type(self),
            session_id=key.session_id,
            backend=self.alias,
            user_id=key.user_id,
            count=count,
        )

    def close(self) -> None:
        self._background.close()
        threads, self._threads = self._threads, None
        with self._lock:
            self._admissions.clear()
        if threads is not None:
            threads.close()
