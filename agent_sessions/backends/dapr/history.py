"""Change a session's history in a state store: append, pop, clear."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from agent_sessions.backends.dapr.reading import WINDOW, Found, Moved, Reader, Rules
from agent_sessions.backends.dapr.records import (
    RECENT,
    Entry,
    Head,
    encode_head,
    encode_segment,
    metadata_key,
    new_name,
)
from agent_sessions.backends.dapr.sidecar import (
    TRIES,
    Conflict,
    Sidecar,
    Unreachable,
    Write,
    pause,
)
from agent_sessions.backends.keys import Asking
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Batch, Item, decode

logger = logging.getLogger("agent_sessions.backends")

# How often a change is tried while others change the same session.
ATTEMPTS = 40
# Of an emptied session the head stays for a day (s), so that writers who read it
# before are found out. It holds no content.
EMPTY_TTL = 24 * 60 * 60
# Segments outlive their head (s), so that a history never ends in parts, also where the
# clocks of those who write differ by so much.
SPARE_TTL = 60 * 60
_CROWDED = "The session is being changed by too many others at once."


@dataclass(frozen=True, slots=True)
class Draft:
    """What a change is to write: segments first, by place, and then the head."""

    head: Head
    segments: Mapping[str, bytes] = field(default_factory=dict)
    item: Item | None = None
    count: int = 0

    def unburdened(self) -> Draft:
        """Take out of the head what is too much for it, under names of its own."""
        if not self.head.is_too_long:
            return self
        head, more = self.head.sealing(new_name())
        return replace(self, head=head, segments={**self.segments, **more})


class History(Reader):
    """One session's items, for the run whose lease is `fence`, if one is given.

    `admit` is awaited before each attempt to write.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        key: str,
        rules: Rules,
        admit: Callable[[], Awaitable[None]] | None = None,
        fence: int | None = None,
    ) -> None:
        super().__init__(sidecar, key, rules)
        self._admit = admit
        self._fence = fence

    async def begin(self) -> Found:
        """Read the head, and write the run's lease into it, before the run reads.

        Who has read the head before, and found its own lease to be the last one, is
        then refused by the store, and asks for its lease anew.
        """

        async def plan(found: Found) -> Draft | None:
            if found.head.fence == self._fence:
                return None
            return Draft(*found.head.sealing()).unburdened()

        found = await self.read()
        if self._fence is None or found.head.fence == self._fence:
            return found
        await self._change(plan)
        return await self.read()

    async def append(self, batch: Batch) -> int:
        now = int(time.time())

        async def plan(found: Found) -> Draft:
            turns = found.head.turns
            entries = (Entry(row.data, turns + row.turn, now) for row in batch.rows)
            head, segments = found.head.sealing()
            grown = replace(
                head,
                tail=(*head.tail, *entries),
                count=head.count + len(batch),
                turns=turns + batch.turns,
            )
            return Draft(grown, segments).unburdened()

        draft = await self._change(plan)
        return 0 if draft is None else draft.head.count

    async def pop(self, asking: Asking) -> Item | None:
        """Remove and return the newest readable item that is accepted.

        The others stay in their places.
        """

        async def plan(found: Found) -> Draft | None:
            head, accept = found.head, asking()
            if (taken := _take(head.tail, accept)) is None:
                return await self._plan_sealed_pop(found, accept)
            item, tail = taken
            count = head.count - 1
            popped = replace(head, tail=tail, count=count, name=new_name())
            return Draft(popped, item=item).unburdened()

        draft = await self._change(plan)
        return None if draft is None else draft.item

    async def _plan_sealed_pop(
        self, found: Found, accept: Callable[[Item], bool]
    ) -> Draft | None:
        head = found.head
        last = not head.tail
        for number in reversed(range(head.sealed)):
            [segment] = await self.segments(found, range(number, number + 1))
            if (taken := _take(segment, accept)) is None:
                # What can't be read stays in its place, so it must keep its number.
                last = last and not segment
                continue
            item, rest = taken
            names, places = head.segments, head.places
            popped = replace(head, count=head.count - 1)
            if last:
                opened = replace(
                    popped,
                    name=new_name(),
                    segments=names[:number],
                    tail=rest,
                    garbage=(*head.garbage, *places[number:]),
                )
                return Draft(opened, item=item)
            popped = replace(
                popped,
                segments=(*names[:number], new_name(), *names[number + 1 :]),
                garbage=(*head.garbage, places[number]),
            )
            return Draft(popped, {popped.places[number]: encode_segment(rest)}, item)
        return None

    async def clear(self) -> int:

        async def plan(found: Found) -> Draft | None:
            head = found.head
            if not found.etag or (head.is_empty and not head.garbage):
                return None
            emptied = Head(
                self.rules.size,
                created=int(time.time()),
                writes=head.writes,
                recent=head.recent,
                garbage=(*head.garbage, *head.places),
            )
            return Draft(emptied, count=head.count)

        draft = await self._change(plan, thorough=True)
        if draft is None:
            return 0
        if (key := metadata_key(self.key)) is not None:
            await self.sidecar.delete_many([key])
        return draft.count

    async def _change(
        self,
        plan: Callable[[Found], Awaitable[Draft | None]],
        *,
        thorough: bool = False,
    ) -> Draft | None:
        """Plan a change and write it, again and again where others come first.

        `thorough` makes a failure to delete what the change left over an error.
        """
        tries = Tries()
        for attempt in range(ATTEMPTS):
            if attempt:
                await pause(attempt, first=0.01)
            try:
                found = await self.read()
                if (done := tries.arrived(found.head)) is not None:
                    return await self._finish(tries, done, thorough=thorough)
                if self._admit is not None:
                    await self._admit()
                draft = await plan(found)
            except Moved:
                continue
            except Unreachable as exc:
                raise tries.failure(exc) from exc
            if draft is None:
                return None
            head = draft.head.marked(new_name())
            if self._fence is not None:
                head = replace(head, fence=self._fence)
            draft = replace(draft, head=head)
            try:
                draft = await self._commit(found, draft)
            except Conflict:
                tries.refused(draft)
            except Unreachable as exc:
                tries.doubt(found.head, draft, exc)
                await pause(attempt + 1, first=0.1)
            else:
                return await self._finish(tries, draft, thorough=thorough)
        raise tries.failure(None)

    async def _commit(self, found: Found, draft: Draft) -> Draft:
        """Write the segments and then the head. Raises Conflict and Unreachable."""
        draft = replace(draft, head=await self._kept_alive(found, draft.head))
        head = draft.head
        ttl = self.rules.ttl
        writes = [
            Write(self.segment_key(place), data, ttl=self._lasting)
            for place, data in draft.segments.items()
        ]
        if head.is_empty:
            ttl = min(ttl or EMPTY_TTL, EMPTY_TTL)
        last = Write(self.key, encode_head(head), found.etag, ttl)
        self.sidecar.check_sizes([*writes, last])
        await self.sidecar.put_many(writes)
        await self.sidecar.save(last)
        return draft

    @property
    def _lasting(self) -> int | None:
        return None if self.rules.ttl is None else 2 * self.rules.ttl + SPARE_TTL

    async def _kept_alive(self, found: Found, head: Head) -> Head:
        """Prolong the sealed segments to live as long as the head is about to.

        They are written again where they wouldn't, so about once in the time to live.
        """
        ttl, lasts, now = self.rules.ttl, head.lasts, int(time.time())
        is_enough = lasts is None if ttl is None else lasts and lasts >= now + ttl
        if head.sealed and is_enough:
            return head
        stop = min(head.sealed, found.head.sealed)
        for first in range(0, stop, WINDOW):
            places = head.places[first : min(first + WINDOW, stop)]
            keys = [self.segment_key(place) for place in places]
            values = await self.sidecar.read_many(keys)
            await self.sidecar.put_many(
                Write(key, value.data, value.etag, self._lasting)
                for key, value in values.items()
                if value.data
            )
        return replace(head, lasts=None if ttl is None else now + 2 * ttl)

    async def _finish(self, tries: Tries, draft: Draft, *, thorough: bool) -> Draft:
        """Delete what the change left over. It is done already, whatever happens."""
        try:
            if stale := tries.written - set(draft.head.places):
                await self.sidecar.delete_many(map(self.segment_key, stale))
            if draft.head.garbage:
                await self._sweep()
        except StorageError as exc:
            if thorough:
                raise StorageError(
                    "The session is empty, but not all of its records could be "
                    "deleted from the state store. Clear it again."
                ) from exc
            logger.warning(
                "Left-over records of a session in the state store %r could not be "
                "deleted (%s); the next change tries again",
                self.sidecar.store_name,
                type(exc).__name__,
            )
        return draft

    async def _sweep(self) -> None:
        found = await self.read()
        await self.sidecar.delete_many(map(self.segment_key, found.head.garbage))
        if not found.head.garbage:
            return
        swept = replace(found.head, garbage=()).marked(new_name())
        try:
            await self._commit(found, Draft(swept))
        except Conflict:
            # Whoever was first has the same garbage to take out.
            return


class Tries:
    """What one change has tried so far, of which some may have arrived unheard."""

    def __init__(self) -> None:
        # The places of segments that may lie there, whether a head tells of them or not.
        self.written: set[str] = set()
        self._drafts: dict[str, Draft] = {}
        self._doubts = 0
        self._writes = 0

    def refused(self, draft: Draft) -> None:
        """Note that a draft's head was refused; its segments may lie there.

        So may the head: the sidecar and clients try again by themselves, and are then
        told of their own first write.
        """
        self.written |= draft.segments.keys()
        self._drafts[draft.head.recent[-1]] = draft

    def doubt(self, head: Head, draft: Draft, exc: Unreachable) -> None:
        """Note that nobody knows whether a draft of a head was written.

        Raises StorageError where that was so too often.
        """
        self.refused(draft)
        if not self._doubts:
            self._writes = head.writes
        self._doubts += 1
        if self._doubts >= TRIES:
            raise self.failure(exc) from exc

    def arrived(self, head: Head) -> Draft | None:
        """Return the draft that was written although no answer said so."""
        for mark, draft in self._drafts.items():
            if mark in head.recent:
                return draft
        if self._doubts and head.writes - self._writes > RECENT:
            raise self.failure(None)
        return None

    def failure(self, exc: Unreachable | None) -> StorageError:
        """Make the error for a change that is given up."""
        if self._doubts:
            return Unreachable(
                f"{exc or _CROWDED} The last change is stored whole or not at all, but "
                "which of both is not known. Read the session before you write it again."
            )
        if exc is not None:
            return Unreachable(f"{exc} Nothing was written; try again.")
        return StorageError(
            f"{_CROWDED} Nothing was written; try again later, or write from fewer "
            "places."
        )


def _take(
    entries: tuple[Entry, ...], accept: Callable[[Item], bool]
) -> tuple[Item, tuple[Entry, ...]] | None:
    """Take the newest item that is accepted out of entries; None where there is none."""
    for index in reversed(range(len(entries))):
        item = decode(entries[index].text)
        if item is not None and accept(item):
            return item, (*entries[:index], *entries[index + 1 :])
    return None
