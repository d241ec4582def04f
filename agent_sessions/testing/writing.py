"""Whole batches, in order, or nothing; also by many at once, and when cancelled."""

from __future__ import annotations

import asyncio
import copy
import datetime
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from agents.memory import SessionSettings

from agent_sessions.testing.base import (
    ContractBase,
    Item,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)
from agent_sessions.testing.reading import DAMAGES


def _circular() -> Item:
    item: Item = message("round")
    item["self"] = item
    return item


def _bottomless() -> Item:
    item: Item = {}
    for _ in range(100_000):
        item = {"a": item}
    return item


# None of it is JSON. NaN and Infinity are stored by many stores and can't be read
# back by strict parsers.
REFUSED: dict[str, Any] = {
    "nan": {**message("x"), "score": math.nan},
    "infinity": {**message("x"), "score": math.inf},
    "minus_infinity": {**message("x"), "deep": [{"er": -math.inf}]},
    "object": {**message("x"), "extra": object()},
    "set": {**message("x"), "extra": {1, 2}},
    "bytes": {**message("x"), "extra": b"raw"},
    "datetime": {**message("x"), "at": datetime.datetime(2030, 1, 1)},  # noqa: DTZ001
    "circular": _circular(),
    "scalar": 42,
    "none": None,
    "string": "just text",
    "list": [message("x")],
}


class WritingCases(ContractBase):
    async def test_empty_list_changes_nothing(self) -> None:
        """An empty batch is accepted, by a new session and by a filled one."""
        session = await self.open()
        assert await session.add_items([]) is None
        assert await session.get_items() == []
        filled = await self.filled(2)
        await filled.add_items([])
        assert len(await filled.get_items()) == 2

    async def test_duplicates_are_kept(self) -> None:
        """The same item twice is two items: in a batch, and in a second call."""
        session = await self.open()
        item = {**message("again"), "id": "msg_1"}
        await session.add_items([item, item])
        await session.add_items([copy.deepcopy(item)])
        assert_same(await session.get_items(), [item] * 3)

    async def test_order_of_a_big_batch(self) -> None:
        """1,500 items of one call come back in their order (they share a clock tick)."""
        session = await self.filled(1)
        await session.add_items(messages(1_500))
        assert_same((await session.get_items())[1:], messages(1_500))
        assert_same(await session.get_items(limit=1_100), messages(1_500)[-1_100:])

    async def test_given_items_are_left_alone(self) -> None:
        """Neither the list nor its dicts are changed, and later changes don't count."""
        session = await self.open()
        given = [{**message("hi"), "_agents_tool_title": "t", "deep": {"a": [1]}}]
        before = copy.deepcopy(given)
        await session.add_items(given)
        assert given == before
        given[0]["deep"]["a"].append(2)
        given.append(message("late"))
        assert_same(await session.get_items(), before)

    @each(REFUSED)
    async def test_is_refused(self, item: Any) -> None:
        """What is no JSON object raises, and nothing of its batch is written.

        The same object goes on as if the call had not been.
        """
        session = await self.open()
        for batch in ([message("good"), item], [item, message("good")]):
            with pytest.raises((ValueError, TypeError)):
                await session.add_items(batch)
            assert await session.get_items() == []
        await session.add_items(messages(2))
        assert_same(await session.get_items(), messages(2))

    async def test_nesting_without_end_is_refused(self) -> None:
        """Nesting that no JSON reader can follow raises a named error."""
        session = await self.filled(1)
        with pytest.raises((ValueError, TypeError)):
            await session.add_items([_bottomless()])
        assert texts(await session.get_items()) == ["item 0"]

    async def test_refused_at_the_end_of_a_big_batch(self) -> None:
        """All or nothing also holds where a store writes a batch in several pieces."""
        session = await self.filled(1)
        batch = [*messages(1_200), {**message("bad"), "score": math.nan}]
        with pytest.raises((ValueError, TypeError)):
            await session.add_items(batch)
        assert texts(await session.get_items()) == ["item 0"]


class PoppingCases(ContractBase):
    async def test_pop_gives_the_newest(self) -> None:
        """Pop removes and returns the newest item, until none is left."""
        session = await self.open()
        assert await session.pop_item() is None
        await session.add_items(messages(3))
        assert_same(await session.pop_item(), message("item 2"))
        assert texts(await session.get_items()) == ["item 0", "item 1"]
        assert_same(await session.pop_item(), message("item 1"))
        assert_same(await session.pop_item(), message("item 0"))
        assert await session.pop_item() is None
        assert await session.get_items() == []

    async def test_pop_is_blind_to_limits(self) -> None:
        """Limits are about reading alone: of the settings, and of reads before."""
        session = await self.filled(3, session_settings=SessionSettings(limit=0))
        await session.get_items(limit=1)
        popped = [await session.pop_item() for _ in range(4)]
        assert_same(popped, [*messages(3)[::-1], None])

    async def test_add_after_pop(self) -> None:
        """The SDK's rewind pops some items and appends them again on a mismatch."""
        session = await self.filled(5)
        popped = [await session.pop_item() for _ in range(3)]
        await session.add_items(popped[::-1])
        assert_same(await session.get_items(), messages(5))
        assert_same(await session.get_items(limit=4), messages(5)[1:])

    @needs("corrupt")
    @each(DAMAGES)
    async def test_pop_passes_over_an_unreadable_tail(self, damage: str) -> None:
        """Pop returns the newest readable item and deletes no unreadable row."""
        session = await self.filled(3)
        original = await self.corrupt(session, -1, damage)
        assert_same(await session.pop_item(), message("item 1"))
        assert texts(await session.get_items()) == ["item 0"]
        assert await self.corrupt(session, -1, original) == damage
        assert texts(await session.get_items()) == ["item 0", "item 2"]

    @needs("corrupt")
    async def test_pop_where_nothing_is_readable(self) -> None:
        """Pop returns None and leaves every unreadable row where it is."""
        session = await self.filled(2)
        originals = [await self.corrupt(session, nth, "not json") for nth in (0, 1)]
        assert await session.pop_item() is None
        assert await session.pop_item() is None
        for nth, original in enumerate(originals):
            await self.corrupt(session, nth, original)
        assert_same(await session.get_items(), messages(2))

    @needs("corrupt")
    async def test_add_after_an_unreadable_tail(self) -> None:
        """New items follow an unreadable one; pops come back over it."""
        session = await self.filled(2)
        await self.corrupt(session, -1, "not json")
        await session.add_items([message("new")])
        assert texts(await session.get_items()) == ["item 0", "new"]
        assert_same(await session.pop_item(), message("new"))
        assert_same(await session.pop_item(), message("item 0"))
        assert await session.pop_item() is None

    async def test_clear_empties(self) -> None:
        """After clear there is nothing; the same object and id start afresh."""
        session = await self.filled(3)
        assert await session.clear_session() is None
        assert await session.get_items() == []
        assert await session.get_items(limit=2) == []
        assert await session.pop_item() is None
        await session.clear_session()
        await session.add_items(messages(2, prefix="afresh"))
        assert texts(await session.get_items()) == ["afresh 0", "afresh 1"]
        assert_same(await session.pop_item(), message("afresh 1"))

    async def test_clear_keeps_other_sessions(self) -> None:
        """Only this session is cleared, whether or not it was ever written to."""
        session, other = await self.open(), await self.filled(2)
        await session.clear_session()
        await session.add_items(messages(3))
        await session.clear_session()
        assert await session.get_items() == []
        assert_same(await other.get_items(), messages(2))

    @needs("corrupt")
    async def test_clear_takes_unreadable_rows_too(self) -> None:
        """Clear leaves nothing behind that could come back."""
        session = await self.filled(3)
        await self.corrupt(session, 1, "not json")
        await session.clear_session()
        await session.add_items([message("afresh")])
        assert texts(await session.get_items()) == ["afresh"]

    @needs("clear_alias")
    async def test_clear_is_an_alias(self) -> None:
        """`clear` does what `clear_session` does."""
        session = await self.filled(3)
        await session.clear()
        assert await session.get_items() == []


# -- many at once --------------------------------------------------------------------

BATCH = 5
CANCELLED: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "add": lambda session: session.add_items(messages(200, prefix="late")),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
}


def batch(name: str) -> list[Item]:
    """Make a batch whose items say which they are, to find it again whole."""
    return [
        {**message(f"{name} {number}"), "batch": name, "number": number}
        for number in range(BATCH)
    ]


def assert_whole(found: list[Item]) -> list[str]:
    """Assert that batches lie one after the other, each whole; return their names."""
    names = [found[start]["batch"] for start in range(0, len(found), BATCH)]
    assert_same(found, [item for name in names for item in batch(name)])
    assert len(names) == len(set(names)), "a batch was stored twice"
    return names


def assert_complete(found: list[Item], *, writers: int, batches: int) -> None:
    names = assert_whole(found)
    assert len(names) == writers * batches
    for writer in range(writers):
        own = [name for name in names if name.startswith(f"{writer}.")]
        assert own == [f"{writer}.{number}" for number in range(batches)]


async def write(session: Any, writer: int, batches: int) -> None:
    for number in range(batches):
        await session.add_items(batch(f"{writer}.{number}"))


class ConcurrencyCases(ContractBase):
    async def test_writers_of_one_object(self) -> None:
        """16 tasks on one object: every batch is there, whole and in its order."""
        session = await self.open()
        await asyncio.gather(*(write(session, writer, 3) for writer in range(16)))
        assert_complete(await session.get_items(), writers=16, batches=3)

    @needs("reopen")
    async def test_writers_with_objects_of_their_own(self) -> None:
        """16 objects of one id: their first writes don't collide, none is lost."""
        session_id = self.new_id()
        sessions = [await self.open(session_id) for _ in range(16)]
        await asyncio.gather(*(write(s, n, 3) for n, s in enumerate(sessions)))
        assert_complete(await sessions[0].get_items(), writers=16, batches=3)

    async def test_reader_beside_writers(self) -> None:
        """Each read continues the one before: nothing appears before what was seen."""
        session = await self.open()
        done = asyncio.Event()

        async def read() -> None:
            seen: list[Item] = []
            while not done.is_set():
                found = await session.get_items()
                assert found[: len(seen)] == seen
                assert_whole(found)
                seen = found
                await asyncio.sleep(0)

        reader = asyncio.create_task(read())
        await asyncio.gather(*(write(session, writer, 4) for writer in range(8)))
        done.set()
        await reader

    async def test_pops_beside_writers(self) -> None:
        """What was written is popped or still there, never both and never neither."""
        session = await self.open()

        async def pop() -> list[Item | None]:
            return [await session.pop_item() for _ in range(8)]

        popping = asyncio.gather(*(pop() for _ in range(4)))
        await asyncio.gather(*(write(session, writer, 5) for writer in range(4)))
        popped = [item for items in await popping for item in items if item]
        found = Counter(texts([*popped, *await session.get_items()]))
        written = [batch(f"{w}.{n}") for w in range(4) for n in range(5)]
        assert found == Counter(texts([item for items in written for item in items]))

    async def test_clear_beside_writers(self) -> None:
        """A clear takes whole batches or leaves them."""
        session = await self.open()

        async def clear() -> None:
            for _ in range(3):
                await asyncio.sleep(0.005)
                await session.clear_session()

        await asyncio.gather(
            clear(), *(write(session, writer, 4) for writer in range(6))
        )
        assert_whole(await session.get_items())
        await session.clear_session()
        assert await session.get_items() == []

    @each(CANCELLED)
    async def test_cancelled_call_is_settled(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """A cancelled caller gets its cancellation when the outcome is settled.

        Then all of it has happened or nothing, and nothing happens afterwards. Further
        cancels wait for the outcome as well.
        """
        delays = (None, 0, 0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
        for number, delay in enumerate(delays):
            session = await self.filled(3)
            task = asyncio.ensure_future(operation(session))
            if delay is not None:
                await asyncio.sleep(delay)
            took = task.cancel()
            for _ in range(number % 3):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() is took
            settled = len(await session.get_items())
            assert settled in {3, 203} | {2, 0}
            await asyncio.sleep(0.05)
            assert len(await session.get_items()) == settled
            await session.add_items([message("goes on")])
            assert texts(await session.get_items(limit=1)) == ["goes on"]

    @needs("threads", "reopen")
    @each({"one_object": True, "objects": False})
    def test_several_threads(self, shared: bool) -> None:
        """Loops in six threads share one object, or have one each of the same id."""
        session = self.run_coroutine(self.open)

        async def work(writer: int) -> None:
            async with asyncio.timeout(self.timeout):
                own = session if shared else await self.open(session.session_id)
                for number in range(4):
                    await own.add_items(batch(f"{writer}.{number}"))
                    await own.get_items(limit=3)

        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(asyncio.run, work(n)) for n in range(6)]:
                future.result()
        assert_complete(self.run_coroutine(session.get_items), writers=6, batches=4)

    @needs("owner")
    async def test_first_writers_of_two_owners(self) -> None:
        """Two users write first to one id: one gets it, and nothing is mixed."""
        users = [await self.make_user(name) for name in ("alice", "bob")]
        session_id = self.new_id()
        sessions = [await self.open(session_id, user=user) for user in users * 4]
        outcomes = await asyncio.gather(
            *(s.add_items(batch(f"{n % 2}.{n}")) for n, s in enumerate(sessions)),
            return_exceptions=True,
        )
        lost = [o is not None for o in outcomes]
        errors = {type(outcome) for outcome in outcomes if outcome is not None}
        assert lost in ([False, True] * 4, [True, False] * 4)
        assert all(issubclass(error, self.foreign_error) for error in errors)
        winner = 0 if not lost[0] else 1
        found = await sessions[winner].get_items()
        assert {name.split(".")[0] for name in assert_whole(found)} == {str(winner)}
        assert len(found) == 4 * BATCH
