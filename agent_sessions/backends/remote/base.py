"""What backends share whose items lie outside Django's databases.

A store only implements the coroutines store_…(). The synchronous forms run the
asynchronous ones in a loop of the backend's own, whose queries run in the caller's
thread meanwhile.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.keys import Asking
from agent_sessions.backends.options import is_printable, parse_age
from agent_sessions.backends.remote.listed import ListedBackend, in_one_database
from agent_sessions.concurrency.connections import choosing
from agent_sessions.concurrency.loops import BackgroundLoop, take
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidBackend,
    MissingExtra,
    StorageError,
)
from agent_sessions.items import Batch, Item, StoredItem, encode_batch
from agent_sessions.items.kinds import opens_turn

T = TypeVar("T")

# The longest time to live. Redis takes no more milliseconds, counted from 1970.
_LONGEST = timedelta(days=36_500)
# Ids of one step of a listing.
_CHUNK = 500


class RemoteBackend(ListedBackend):
    """Base of backends over other stores; OPTIONS of all are those of ListedBackend."""

    # Whether the store tells how many items there are. Else whole readings correct rows.
    tells_counts: ClassVar[bool] = True
    # Whether the store may drop older items by itself, so that counts can't be added up.
    trims = False
    # The id of the errors about values of its options.
    check_id: ClassVar[str] = "agent_sessions.E008"
    # The package that it needs, which has an extra of that name.
    requires: ClassVar[str] = ""

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        """See ListedBackend. Raises InvalidBackend and MissingExtra."""
        super().__init__(alias, options, listed=listed)
        if self.requires and find_spec(self.requires) is None:
            raise MissingExtra(type(self).__name__, self.requires)
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
        """Return the option ttl; None is for ever. Raises InvalidBackend."""
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

    def check_secret(self, name: str, secret: Any) -> list[checks.CheckMessage]:
        """Report a key or token that can't be sent in a header."""
        if not isinstance(secret, str) or is_printable(secret):
            return []
        return [
            checks.Error(
                f"AGENT_SESSIONS[{self.alias!r}]: {name} holds a character that can't be "
                "sent: a blank, a line's end or a letter that is not ASCII.",
                hint="Copy it again, without what stands around it.",
                id=self.check_id,
            )
        ]

    # -- what a store implements -----------------------------------------------------

    @abstractmethod
    async def store_append(self, key: SessionKey, batch: Batch) -> int | None:
        """Store a batch whole, contiguous and in order, or not at all.

        Return how many items there are then, if the store knows.
        """

    @abstractmethod
    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """Read the newest `limit` (1 or more) readable items, oldest first."""

    @abstractmethod
    async def store_pop(self, key: SessionKey) -> Item | None:
        """Remove and return the newest readable item."""

    async def store_pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        """Do what pop_if() does, where `supports_pop_if` is set."""
        raise NotImplementedError(f"{type(self).__name__} pops what is newest.")

    @abstractmethod
    async def store_clear(self, key: SessionKey) -> int:
        """Remove every item; tell how many there were. Nothing there is no error."""

    @abstractmethod
    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        """Read the items that a page is to hold."""

    def store_ids(self) -> AsyncIterator[str]:
        """Return what list_ids() does, where `supports_listing` is set."""
        raise NotImplementedError(f"{type(self).__name__} can't list its sessions.")

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        """Remove the items of a session whose row is gone; `remote_id` was its own."""
        return await self.store_clear(key)

    # -- async -------------------------------------------------------------------

    @in_one_database
    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            await self._add(key, encode_batch(items), self.store_append)

    async def _add(
        self,
        key: SessionKey,
        batch: Batch,
        store: Callable[[SessionKey, Batch], Awaitable[int | None]],
        *,
        replaces: bool = False,
    ) -> None:
        async def write() -> None:
            count = await store(key, batch)
            # Others write too, and their rows may be written before or after ours.
            adds_up = not (replaces or self.trims)
            added = before + len(batch)
            await self._touch(key, count, added, batch.title, adds_up=adds_up)

        asks = self.tells_counts and not self.trims
        read = partial(self.store_page, key, Stretch(limit=1))
        before = await self.aenroll(key, read, asks=asks)
        await settle(write())

    @in_one_database
    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        seen = await self.aadmit(key)
        items = [] if limit == 0 else await self.store_latest(key, limit)
        if not self.tells_counts and (limit is None or len(items) < limit):
            await self._correct(key, seen, len(items))
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
        self, key: SessionKey, popping: Coroutine[Any, Any, Item | None]
    ) -> Item | None:
        item = await popping
        if item is not None:
            await self._touch(key, None, -1)
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
        used = datetime.now(UTC) if seen is None else seen.updated_at
        page = await self.store_page(key, Stretch(before, after, limit, used))
        await self._correct(key, seen, page.total)
        return page

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
        return self._await(self.store_erase(key, remote_id))

    def list_ids(self) -> Iterator[str]:
        """Return the ids of the sessions without an owner that the store has.

        Also those that have no row. Raises NotImplementedError without
        `supports_listing`.
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


# -- parts of a history ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which items a page is to hold, as page() is asked for them.

    `used` is when the session was last used: it stands for the times of items where a
    store doesn't tell them.
    """

    before: int | None = None
    after: int | None = None
    limit: int = 100
    used: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def last(self) -> int | None:
        """The last position that need be read; None for the newest."""
        if self.after is not None:
            return self.after + self.limit
        return None if self.before is None else self.before - 1

    def bounds(self, end: int) -> tuple[int, int]:
        """Return which of `end` positions the page holds: from behind one up to one."""
        if self.after is not None:
            start = min(max(self.after, 0), end)
            return start, min(start + self.limit, end)
        stop = end if self.before is None else min(max(self.before - 1, 0), end)
        return max(stop - self.limit, 0), stop

    def cut(self, items: Sequence[Item], *, skipped: int = 0, turn: int = 0) -> Page:
        """Cut the page out of a history, oldest first.

        An item's position is its number, from 1, so it stays while items are appended
        and popped. `skipped` items with `turn` turns lie before the ones given.
        """
        end = skipped + len(items)
        start, stop = self.bounds(end)
        turn += sum(map(opens_turn, items[: start - skipped]))
        found = []
        for number, item in enumerate(
            items[start - skipped : stop - skipped], start + 1
        ):
            turn += opens_turn(item)
            raw = json.dumps(item, separators=(",", ":"))
            # A copy, since the store may have given its own.
            copy, used = json.loads(raw), self.used
            found.append(StoredItem(number, turn, copy, raw, used, is_timed=False))
        return Page(found, start > 0, stop < end, total=end)


async def read_readable(
    read: Callable[[int | None], Awaitable[Sequence[T]]],
    decode: Callable[[T], Item | None],
    limit: int | None,
) -> list[Item]:
    """Read back from the end of a history until it gives `limit` readable items.

    `read` returns so many of the newest entries, oldest first, or all for None.
    """
    window = limit
    while True:
        entries = await read(window)
        items = [item for each in entries if (item := decode(each)) is not None]
        if limit is None or window is None or len(entries) < window:
            return items if limit is None else items[-limit:]
        if len(items) >= limit:
            return items[-limit:]
        window *= 2


# -- errors of clients -----------------------------------------------------------------

# What an error's words mean: the class to raise, and what to do.
Advice = tuple[type[StorageError], str]


@contextmanager
def translated(translate: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raise what a client raises as an error of ours, without its text and its cause.

    They may quote items and passwords.
    """
    try:
        yield
    except AgentSessionError:
        raise
    except Exception as exc:
        raise translate(exc) from None


def find_advice(
    words: Iterable[object], table: Mapping[Any, Advice], otherwise: Advice
) -> Advice:
    """Return what a store's table says of the first of an error's words it has.

    Words are what tells errors apart: a server's code, or the name of a class.
    """
    return next((table[word] for word in words if word in table), otherwise)


def class_names(exc: BaseException) -> list[str]:
    """Return the names of an error's classes, its own first, as words of a table."""
    return [kind.__name__ for kind in type(exc).__mro__]
