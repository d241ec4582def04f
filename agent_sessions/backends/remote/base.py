"""What backends share whose items lie outside Django's databases.

The directory's row in a Django database still says whose a session is. A store only
implements the coroutines store_…(). The synchronous forms run the asynchronous ones in
a loop of the backend's own, whose queries run in the caller's thread meanwhile.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.keys import Asking
from agent_sessions.backends.options import parse_age
from agent_sessions.backends.remote.listed import (
    ListedBackend,
    Written,
    in_one_database,
)
from agent_sessions.backends.remote.paging import Stretch
from agent_sessions.concurrency.connections import choosing
from agent_sessions.concurrency.loops import BackgroundLoop, take
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.items import Batch, Item, encode_batch

if TYPE_CHECKING:
    from agent_sessions.backends.directory import Seen

__all__ = ["RemoteBackend", "Stretch", "Written"]

T = TypeVar("T")

# The item that was removed, if there was one, and how many are left.
Popped = tuple[Item | None, Written]
# The longest time to live. Redis takes no more milliseconds, counted from 1970.
_LONGEST = timedelta(days=36_500)
# Ids of one step of a listing.
_CHUNK = 500


class RemoteBackend(ListedBackend):
    """Base of backends over other stores than Django's databases.

    OPTIONS of all: those of ListedBackend.
    """

    # The id of the errors about values of its options.
    check_id: ClassVar[str] = "agent_sessions.E008"

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        """Configure the backend; without `listed` it keeps no directory at all."""
        super().__init__(alias, options, listed=listed)
        self._background = BackgroundLoop(f"agent_sessions-{alias}")

    # -- options ---------------------------------------------------------------------

    def invalid_option(
        self, name: str, hint: str, problem: str = "is not valid"
    ) -> InvalidBackend:
        """Return the error for an option. Its value may be a secret: it isn't quoted."""
        return InvalidBackend(
            f"AGENT_SESSIONS[{self.alias!r}]: the option {name} {problem}.",
            hint=hint,
            id=self.check_id,
        )

    def read_whole(self, name: str, least: int, most: int = 2**31) -> int:
        """Return an option that is a whole number. Raises InvalidBackend."""
        value = self.options[name]
        if type(value) is int and least <= value <= most:
            return value
        to = "or more" if most == 2**31 else f"to {most}"
        raise self.invalid_option(name, f"Give a whole number of {least} {to}.")

    def read_seconds(self, name: str) -> float:
        """Return an option that is a length of time. Raises InvalidBackend."""
        value: float = self.options[name]
        if type(value) in {int, float} and value > 0:
            return value
        raise self.invalid_option(name, "Give a number of seconds above 0.")

    def read_ttl(self) -> timedelta | None:
        """Return the option ttl; None keeps a history for ever.

        Raises InvalidBackend.
        """
        value = self.options["ttl"]
        if value is None:
            return None
        try:
            if type(value) in {int, float}:
                value = timedelta(seconds=value)
            if (ttl := parse_age(value)) <= _LONGEST:
                return ttl
        except (OverflowError, ValueError):
            pass
        raise self.invalid_option(
            "ttl",
            'Give a timedelta, seconds or text such as "30d", more than 0 and at most '
            "100 years, or None for ever.",
        )

    # -- what a store implements -----------------------------------------------------

    @abstractmethod
    async def store_append(self, key: SessionKey, batch: Batch) -> Written:
        """Store a batch whole, contiguous and in order, or not at all."""

    @abstractmethod
    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """Read the newest `limit` (1 or more) readable items, oldest first."""

    @abstractmethod
    async def store_pop(self, key: SessionKey) -> Popped:
        """Remove and return the newest readable item."""

    async def store_pop_if(self, key: SessionKey, asking: Asking) -> Popped:
        """Remove and return the newest item that is accepted; others stay.

        Only where `supports_pop_if` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} pops what is newest.")

    @abstractmethod
    async def store_clear(self, key: SessionKey) -> int:
        """Remove every item; tell how many there were. Nothing there is no error."""

    @abstractmethod
    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        """Read the items that a page is to hold."""

    async def store_count(self, key: SessionKey) -> int | None:
        """Return how many items there are, if that is known without reading them."""
        return None

    def store_ids(self) -> AsyncIterator[str]:
        """Return the ids of the sessions without an owner that the store has.

        Only where `supports_listing` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} can't list its sessions.")

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        """Remove the items of a session whose row is gone; `remote_id` was its own."""
        return await self.store_clear(key)

    async def last_used(self, key: SessionKey) -> datetime:
        """Return when a session was last used, for stores that tell no times."""
        seen = None
        if self.listed:
            seen = await self.on_directory(self.directory.look, key)
        return datetime.now(UTC) if seen is None else seen.updated_at

    # -- async -------------------------------------------------------------------

    @in_one_database
    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            batch = encode_batch(items)
            await self.aadmit(key, write=True)
            await settle(self._append(key, batch))

    async def _append(self, key: SessionKey, batch: Batch) -> None:
        await self._touch(key, await self.store_append(key, batch), batch.title)

    @in_one_database
    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        seen = await self.aadmit(key)
        items = [] if limit == 0 else await self.store_latest(key, limit)
        await self._correct_count(key, seen)
        return items

    @in_one_database
    async def apop(self, key: SessionKey) -> Item | None:
        await self.aadmit(key)
        return await settle(self._pop(key, self.store_pop(key)))

    @in_one_database
    async def apop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        await self.aadmit(key)
        return await settle(self._pop(key, self.store_pop_if(key, asking)))

    async def _pop(
        self, key: SessionKey, popping: Coroutine[Any, Any, Popped]
    ) -> Item | None:
        item, written = await popping
        if item is not None:
            await self._touch(key, written)
        return item

    @in_one_database
    async def aclear(self, key: SessionKey) -> int:
        await self.aadmit(key)
        return await settle(self._clear(key))

    async def _clear(self, key: SessionKey) -> int:
        if self.listed:
            await self.on_directory(self._revoke_lease, key)
        count = await self.store_clear(key)
        if self.listed:
            await self.on_directory(self._cleared, key, count)
        return count

    @in_one_database
    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        seen = await self.aadmit(key)
        page = await self.store_page(key, Stretch(before, after, limit))
        await self.aflush(key)
        await self._correct_count(key, seen)
        return page

    async def _correct_count(self, key: SessionKey, seen: Seen | None) -> None:
        """Correct what a row says of its items, unless it has changed since.

        A process that was killed may not have written its last count.
        """
        if seen is not None:
            count = await self.store_count(key)
            if count not in {None, seen.item_count}:
                await self.on_directory(self._recount, key, seen, count)

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        self._await(self.aappend(key, items))

    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        return self._await(self.alatest(key, limit))

    def pop(self, key: SessionKey) -> Item | None:
        return self._await(self.apop(key))

    def pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        return self._await(self.apop_if(key, asking))

    def clear(self, key: SessionKey) -> int:
        return self._await(self.aclear(key))

    def page(self, key: SessionKey, **edges: Any) -> Page:
        return self._await(self.apage(key, **edges))

    def erase(self, key: SessionKey, remote_id: str = "") -> int:
        self._known_rows.forget(key)
        return self._await(self.store_erase(key, remote_id))

    def list_ids(self) -> Iterator[str]:
        """Return the ids of the sessions without an owner that the store has.

        Also those that have no row. Raises NotImplementedError where the store can't
        tell, see `supports_listing`.
        """
        ids = self.store_ids()
        while chunk := self._await(take(ids, _CHUNK)):
            yield from chunk

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self.asks_router:
            return self._background.run(coroutine)
        with choosing(self.using):
            return self._background.run(coroutine)

    def close(self) -> None:
        super().close()
        self._background.close()
