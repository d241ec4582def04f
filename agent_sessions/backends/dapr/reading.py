"""Read a session's history from a state store: the newest items, and pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from agent_sessions.backends.base import Page
from agent_sessions.backends.dapr.records import (
    Entry,
    Head,
    Unreadable,
    decode_head,
    decode_segment,
    is_from_sdk,
    metadata_key,
    new_head,
    segment_key,
    split,
)
from agent_sessions.backends.dapr.sidecar import Sidecar, Value, pause
from agent_sessions.backends.remote.paging import Stretch
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Item, StoredItem, decode

logger = logging.getLogger("agent_sessions.backends")

# How many segments one request asks for.
WINDOW = 64
# How often a read begins anew where others change what it reads.
READS = 20


@dataclass(slots=True)
class Rules:
    """How histories are stored: entries of a segment, seconds to live.

    `transactions` says whether the store has them; None until the first was tried.
    """

    size: int = 32
    ttl: int | None = None
    transactions: bool | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A head as it was read, with the etag of that."""

    head: Head
    etag: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed segment as it was read; `entries` is None where it can't be."""

    raw: str
    entries: tuple[Entry, ...] | None


class Moved(Exception):
    """The history changed while it was read."""


class Reader:
    """One session's history, to be read."""

    def __init__(self, sidecar: Sidecar, key: str, rules: Rules) -> None:
        self.sidecar = sidecar
        self.key = key
        self.rules = rules

    async def latest(self, limit: int | None) -> list[Item]:
        """Read the newest readable items, oldest first."""
        for attempt in range(READS):
            if attempt:
                await pause(attempt, first=0.01)
            try:
                return await self._latest(await self.read(), limit)
            except Moved:
                continue
        raise StorageError(_RESTLESS)

    async def _latest(self, found: Found, limit: int | None) -> list[Item]:
        head = found.head
        items = list(_newest_first(head.tail, limit))
        number = head.sealed
        while number and (limit is None or len(items) < limit):
            wanted = WINDOW
            if limit is not None:
                wanted = min(WINDOW, (limit - len(items)) // head.size + 1)
            first = max(0, number - wanted)
            segments = await self.segments(found, range(first, number))
            for segment in reversed(segments):
                left = None if limit is None else limit - len(items)
                items += _newest_first(segment.entries or (), left)
            number = first
        return items[::-1]

    async def page(self, wanted: Stretch) -> Page:
        """Read the items nearest to a position; see BaseSessionBackend.page().

        A position is the place in its segment: the first of segment n is n x size + 1.
        """
        for attempt in range(READS):
            if attempt:
                await pause(attempt, first=0.01)
            try:
                found = await self.read()
                if wanted.after is not None:
                    return await self._page_after(found, wanted.after, wanted.limit)
                return await self._page_before(found, wanted.before, wanted.limit)
            except Moved:
                continue
        raise StorageError(_RESTLESS)

    async def _page_before(self, found: Found, before: int | None, limit: int) -> Page:
        size = found.head.size
        open_segments = _open_segments(found.head)
        stop = found.head.sealed + len(open_segments)
        if before is not None:
            stop = min(stop, (before - 2) // size + 1)
        rows: list[StoredItem] = []
        while stop > 0 and len(rows) <= limit:
            first = max(0, stop - min(WINDOW, (limit - len(rows)) // size + 1))
            more = await self._rows(found, open_segments, range(first, stop))
            rows[:0] = [row for row in more if before is None or row.position < before]
            stop = first
        newest = _last_position(found.head, open_segments)
        later = before is not None and before <= newest
        return Page(rows[-limit:], len(rows) > limit, later)

    async def _page_after(self, found: Found, after: int, limit: int) -> Page:
        size = found.head.size
        open_segments = _open_segments(found.head)
        end = found.head.sealed + len(open_segments)
        first = max(after, 0) // size
        rows: list[StoredItem] = []
        while first < end and len(rows) <= limit:
            stop = min(end, first + min(WINDOW, (limit - len(rows)) // size + 1))
            more = await self._rows(found, open_segments, range(first, stop))
            rows += [row for row in more if row.position > after]
            first = stop
        earlier = after > 0 and found.head.count > 0
        return Page(rows[:limit], earlier, len(rows) > limit)

    async def _rows(
        self,
        found: Found,
        open_segments: Sequence[tuple[Entry, ...]],
        numbers: range,
    ) -> list[StoredItem]:
        """Read stretches of segments, sealed and open, as rows with positions."""
        head = found.head
        sealed = range(numbers.start, min(numbers.stop, head.sealed))
        segments = await self.segments(found, sealed) if sealed else []
        rows: list[StoredItem] = []
        for number, segment in zip(sealed, segments, strict=True):
            if segment.entries is None:
                lost = Entry(segment.raw, 0, head.created)
                rows.append(_row(head, number * head.size + 1, lost, readable=False))
            else:
                rows += _numbered(head, number, segment.entries)
        for number in range(max(numbers.start, head.sealed), numbers.stop):
            rows += _numbered(head, number, open_segments[number - head.sealed])
        return rows

    async def read(self) -> Found:
        """Read the head, or make one. Raises StorageError where it is unreadable."""
        value = await self.sidecar.read(self.key)
        if not value.data:
            return Found(new_head(self.rules.size, int(time.time())), value.etag)
        try:
            head = decode_head(value.data, self.rules.size)
        except Unreadable as exc:
            raise StorageError(
                f"The head record of a session can't be read, so nothing of it was "
                f"read or written: {exc} Restore the record with the key {self.key!r} "
                "in the state store, or delete it to begin the session afresh."
            ) from None
        if is_from_sdk(value.data):
            head = replace(head, created=await self._sdk_created())
        return Found(head, value.etag)

    async def _sdk_created(self) -> int:
        """Read when the SDK's class began the session, else take this moment."""
        if (key := metadata_key(self.key)) is not None:
            record = decode((await self.sidecar.read(key)).data) or {}
            created = str(record.get("created_at"))
            if created.isascii() and created.isdigit():
                return int(created)
        return int(time.time())

    async def segments(self, found: Found, numbers: Iterable[int]) -> list[Segment]:
        """Read sealed segments. Raises Moved where one went with a later change."""
        keys = [self._segment_key(found.head, number) for number in numbers]
        values = await self.sidecar.read_many(keys)
        if any(not value.data for value in values.values()):
            now = await self.sidecar.read(self.key)
            if now.etag != found.etag:
                raise Moved
        return [self._segment(values[key]) for key in keys]

    def _segment(self, value: Value) -> Segment:
        raw = value.data.decode(errors="replace")
        try:
            return Segment(raw, decode_segment(value.data))
        except Unreadable:
            logger.warning(
                "A segment of a session in the state store %r can't be read and is "
                "passed over; it stays where it is",
                self.sidecar.store_name,
            )
            return Segment(raw, None)

    def _segment_key(self, head: Head, number: int) -> str:
        return segment_key(self.key, head.generation_of(number), number)


_RESTLESS = (
    "The session's history was changed again and again while it was read. Read it once "
    "more."
)


def _newest_first(entries: Sequence[Entry], limit: int | None) -> Iterator[Item]:
    left = limit
    for entry in reversed(entries):
        if left == 0:
            return
        if (item := decode(entry.text)) is not None:
            yield item
            left = None if left is None else left - 1


def _open_segments(head: Head) -> list[tuple[Entry, ...]]:
    """Cut the tail as it will be cut when it is sealed."""
    full, rest = split(head.tail, head.size)
    return [*full, rest] if rest else full


def _last_position(head: Head, open_segments: Sequence[tuple[Entry, ...]]) -> int:
    if not open_segments:
        return head.sealed * head.size
    number = head.sealed + len(open_segments) - 1
    return number * head.size + len(open_segments[-1])


def _numbered(
    head: Head, number: int, entries: Iterable[Entry]
) -> Iterator[StoredItem]:
    for position, entry in enumerate(entries, number * head.size + 1):
        yield _row(head, position, entry)


def _row(
    head: Head, position: int, entry: Entry, *, readable: bool = True
) -> StoredItem:
    written = datetime.fromtimestamp(entry.created or head.created, UTC)
    item = decode(entry.text) if readable else None
    return StoredItem(position, entry.turn, item, entry.text, written)
