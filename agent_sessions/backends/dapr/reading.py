"""Read a session's history from a state store: the newest items, and pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from agent_sessions.backends.base import Page
from agent_sessions.backends.dapr.records import (
    Entry,
    Head,
    Unreadable,
    decode_head,
    decode_segment,
    split,
    unreadable_text,
)
from agent_sessions.backends.dapr.sidecar import Sidecar, Value, pause
from agent_sessions.backends.remote.base import Stretch
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Item, StoredItem, decode

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# How many segments one request asks for.
WINDOW = 64
# How often a read begins anew where others change what it reads.
READS = 20


@dataclass(frozen=True, slots=True)
class Rules:
    """How histories are stored: entries of a segment, seconds to live."""

    size: int = 32
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A head as it was read, with the etag of that."""

    head: Head
    etag: str


class Moved(Exception):
    """The history changed while it was read."""


class Reader:
    """One session's history, to be read."""

    def __init__(self, sidecar: Sidecar, key: str, rules: Rules) -> None:
        self.sidecar = sidecar
        self.key = key
        self.rules = rules

    async def latest(self, limit: int | None) -> list[Item]:
        return await self._undisturbed(lambda found: self._latest(found, limit))

    async def page(self, wanted: Stretch) -> Page:
        """Read the items nearest to a position; see BaseSessionBackend.page().

        A position is the place in its segment: the first of segment n is n x size + 1.
        """
        return await self._undisturbed(lambda found: self._page(found, wanted))

    async def _undisturbed(self, read: Callable[[Found], Awaitable[T]]) -> T:
        """Read, and begin anew where the history changes meanwhile."""
        for attempt in range(READS):
            if attempt:
                await pause(attempt, first=0.01)
            with suppress(Moved):
                return await read(await self.begin())
        raise StorageError(
            "The session's history was changed again and again while it was read. Read "
            "it once more."
        )

    async def begin(self) -> Found:
        """Read the head before what it tells of."""
        return await self.read()

    async def _latest(self, found: Found, limit: int | None) -> list[Item]:
        head = found.head
        items, number = _newest_first(head.tail), head.sealed
        while number and (limit is None or len(items) < limit):
            wanted = WINDOW
            if limit is not None:
                wanted = min(WINDOW, (limit - len(items)) // head.size + 1)
            first = max(0, number - wanted)
            for entries in reversed(await self.segments(found, range(first, number))):
                items += _newest_first(entries)
            number = first
        return items[:limit][::-1]

    async def _page(self, found: Found, wanted: Stretch) -> Page:
        head, size, limit = found.head, found.head.size, wanted.limit
        before, after = wanted.before, wanted.after
        # The tail, cut as it will be when it is sealed.
        full, rest = split(head.tail, size)
        unsealed = [*full, rest] if rest else full
        numbers = range(head.sealed + len(unsealed))
        newest = head.sealed * size
        if unsealed:
            newest = (len(numbers) - 1) * size + len(unsealed[-1])
        if after is not None:
            numbers, before = numbers[max(after, 0) // size :], None
        elif before is not None:
            numbers = numbers[: max(before - 2, -size) // size + 1]
        rows: list[StoredItem] = []
        while numbers and len(rows) <= limit:
            count = min(WINDOW, (limit - len(rows)) // size + 1)
            if after is not None:
                part, numbers = numbers[:count], numbers[count:]
            else:
                part, numbers = numbers[-count:], numbers[:-count]
            sealed = range(part.start, min(part.stop, head.sealed))
            segments = await self.segments(found, sealed)
            segments += unsealed[max(part.start - head.sealed, 0) :][
                : len(part) - len(sealed)
            ]
            more = [
                row
                for number, entries in zip(part, segments, strict=True)
                for row in _rows(entries, number * size + 1, head.created)
                if (after is None or row.position > after)
                and (before is None or row.position < before)
            ]
            rows = [*rows, *more] if after is not None else [*more, *rows]
        is_cut = len(rows) > limit
        if after is not None:
            earlier = after > 0 and head.count > 0
            return Page(rows[:limit], earlier, is_cut, total=head.count)
        later = before is not None and before <= newest
        return Page(rows[-limit:], is_cut, later, total=head.count)

    async def read(self) -> Found:
        """Read the head, or make one. Raises StorageError where it is unreadable."""
        value = await self.sidecar.read(self.key)
        if not value.data:
            return Found(Head(self.rules.size, created=int(time.time())), value.etag)
        try:
            head = decode_head(value.data, self.rules.size)
        except Unreadable as exc:
            raise StorageError(
                f"The head record of a session can't be read, so nothing of it was "
                f"read or written: {exc} Restore the record with the key {self.key!r} "
                "in the state store, or delete it to begin the session afresh."
            ) from None
        return Found(head, value.etag)

    async def segments(self, found: Found, numbers: range) -> list[tuple[Entry, ...]]:
        """Read sealed segments. Raises Moved where one went with a later change.

        One that can't be read has one entry, which can't be read either.
        """
        places = found.head.places[numbers.start : numbers.stop]
        keys = [self.segment_key(place) for place in places]
        values = await self.sidecar.read_many(keys)
        if any(not value.data for value in values.values()):
            now = await self.sidecar.read(self.key)
            if now.etag != found.etag:
                raise Moved
        return [self._segment(values[key]) for key in keys]

    def _segment(self, value: Value) -> tuple[Entry, ...]:
        try:
            return decode_segment(value.data)
        except Unreadable:
            logger.warning(
                "A segment of a session in the state store %r can't be read and is "
                "passed over; it stays where it is",
                self.sidecar.store_name,
            )
            return (Entry(unreadable_text(value.data)),)

    def segment_key(self, place: str) -> str:
        return f"{self.key}:{place}"


def _newest_first(entries: tuple[Entry, ...]) -> list[Item]:
    found = (decode(entry.text) for entry in reversed(entries))
    return [item for item in found if item is not None]


def _rows(entries: tuple[Entry, ...], first: int, created: int) -> list[StoredItem]:
    return [
        StoredItem(
            position,
            entry.turn,
            decode(entry.text),
            entry.text,
            datetime.fromtimestamp(entry.created or created, UTC),
        )
        for position, entry in enumerate(entries, first)
    ]
