"""add_items, pop_item and clear_session: whole batches, in order, or nothing."""

from __future__ import annotations

import copy
import datetime
import math
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
