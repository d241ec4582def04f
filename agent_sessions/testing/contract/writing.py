"""add_items: whole batches, in order, or an error and nothing."""

from __future__ import annotations

import copy
import datetime
import math
from typing import Any

import pytest

from agent_sessions.testing.contract.base import (
    ContractBase,
    Item,
    assert_same,
    each,
    message,
    messages,
    texts,
)


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
    "datetime": {
        **message("x"),
        "at": datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC),
    },
    "circular": _circular(),
    "scalar": 42,
    "none": None,
    "string": "just text",
    "list": [message("x")],
}


class WritingCases(ContractBase):
    async def test_empty_list_changes_nothing(self) -> None:
        """Nothing to add is fine, on a new session and on a filled one."""
        session = await self.open()
        await session.add_items([])
        assert await session.get_items() == []
        filled = await self.filled(2)
        await filled.add_items([])
        assert len(await filled.get_items()) == 2

    async def test_returns_none(self) -> None:
        """The protocol's add_items returns nothing."""
        assert await (await self.open()).add_items(messages(1)) is None

    async def test_calls_follow_each_other(self) -> None:
        """Batches stand in the order of the calls."""
        session = await self.open()
        for number in range(5):
            await session.add_items(messages(3, prefix=f"batch {number}"))
        expected = [m for n in range(5) for m in messages(3, prefix=f"batch {n}")]
        assert_same(await session.get_items(), expected)

    async def test_duplicates_are_kept(self) -> None:
        """The same item twice is two items: in a batch, and in a second call."""
        session = await self.open()
        item = {**message("again"), "id": "msg_1"}
        await session.add_items([item, item])
        await session.add_items([copy.deepcopy(item)])
        assert_same(await session.get_items(), [item] * 3)

    async def test_order_of_a_big_batch(self) -> None:
        """1,500 items of one call come back in their order (they share a clock tick)."""
        session = await self.open()
        await session.add_items([message("first")])
        await session.add_items(messages(1_500))
        found = await session.get_items()
        assert_same(found[1:], messages(1_500))
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
        """What is no JSON object raises, and nothing of its batch is written."""
        session = await self.filled(1)
        with pytest.raises((ValueError, TypeError)):
            await session.add_items([message("good"), item])
        assert texts(await session.get_items()) == ["item 0"]
        with pytest.raises((ValueError, TypeError)):
            await session.add_items([item, message("good")])
        assert texts(await session.get_items()) == ["item 0"]

    async def test_nesting_without_end_is_refused(self) -> None:
        """Nesting that no JSON reader can follow raises a named error."""
        session = await self.filled(1)
        with pytest.raises((ValueError, TypeError)):
            await session.add_items([_bottomless()])
        assert texts(await session.get_items()) == ["item 0"]

    async def test_refused_at_the_end_of_a_big_batch(self) -> None:
        """All or nothing also where a store writes a batch in several pieces."""
        session = await self.filled(1)
        batch = [*messages(1_200), {**message("bad"), "score": math.nan}]
        with pytest.raises((ValueError, TypeError)):
            await session.add_items(batch)
        assert texts(await session.get_items()) == ["item 0"]

    async def test_usable_after_a_refusal(self) -> None:
        """The same object goes on after an error, as if it had not been."""
        session = await self.open()
        with pytest.raises((ValueError, TypeError)):
            await session.add_items([{**message("x"), "score": math.nan}])
        assert await session.get_items() == []
        await session.add_items(messages(2))
        assert_same(await session.get_items(), messages(2))
