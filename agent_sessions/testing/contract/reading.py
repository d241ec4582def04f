"""get_items: which items, how many, in which order, as fresh dicts."""

from __future__ import annotations

import copy

from agents.memory import SessionSettings

from agent_sessions.testing.contract.base import (
    ContractBase,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)

LARGEST = 2_147_483_647

# What can lie in a row that no reader can use: the Runner would send scalars and
# None to the model unfiltered.
DAMAGES = {
    "cut_off": '{"role": "user", "cont',
    "not_json": "not json",
    "empty": "",
    "null": "null",
    "number": "42",
    "string": '"text"',
    "list": "[1]",
}


class ReadingCases(ContractBase):
    async def test_new_session_is_empty(self) -> None:
        """A session that nobody wrote to reads as an empty list."""
        session = await self.open()
        assert await session.get_items() == []
        assert await session.get_items(limit=5) == []

    async def test_all_items_in_order(self) -> None:
        """Without any limit, everything comes back in the order of writing."""
        session = await self.filled(12)
        assert_same(await session.get_items(), messages(12))

    @each({"one": 1, "some": 4, "all_but_one": 9, "exactly_all": 10, "more": 11})
    async def test_limit_gives_the_newest(self, limit: int) -> None:
        """N gives the newest N, oldest of them first."""
        session = await self.filled(10)
        assert_same(await session.get_items(limit=limit), messages(10)[-limit:])

    async def test_limit_zero_gives_nothing(self) -> None:
        """Zero is a limit, not the lack of one."""
        session = await self.filled(3)
        assert await session.get_items(limit=0) == []
        session.session_settings = SessionSettings(limit=0)
        assert await session.get_items() == []

    async def test_limit_of_the_largest_integer_gives_all(self) -> None:
        """The SDK's compaction uses 2147483647 for everything."""
        session = await self.filled(3)
        assert len(await session.get_items(limit=LARGEST)) == 3

    async def test_negative_limit_gives_nothing(self) -> None:
        """A negative limit is refused or gives nothing; it never means everything."""
        session = await self.filled(3)
        try:
            found = await session.get_items(limit=-1)
        except ValueError:
            return
        assert found == []

    async def test_settings_limit_applies(self) -> None:
        """`session_settings.limit` counts where no limit is given."""
        session = await self.filled(5, session_settings=SessionSettings(limit=2))
        assert texts(await session.get_items()) == ["item 3", "item 4"]

    async def test_explicit_limit_wins(self) -> None:
        """A limit given beats the settings, in both directions."""
        session = await self.filled(5, session_settings=SessionSettings(limit=2))
        assert len(await session.get_items(limit=4)) == 4
        assert len(await session.get_items(limit=1)) == 1
        assert await session.get_items(limit=0) == []

    async def test_fresh_dicts(self) -> None:
        """Callers may change what they got, deep down, and nobody else sees it."""
        session = await self.open()
        item = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        await session.add_items([copy.deepcopy(item)])
        first = await session.get_items()
        first[0]["content"][0]["text"] = "changed"
        first[0]["role"] = "changed"
        first.append(message("more"))
        assert_same(await session.get_items(), [item])

    async def test_plain_types(self) -> None:
        """A list of dicts, nothing lazy and no subclasses."""
        found = await (await self.filled(2)).get_items()
        assert type(found) is list
        assert {type(item) for item in found} == {dict}

    @needs("reopen")
    async def test_second_object_sees_the_same(self) -> None:
        """Another object of the same id reads what the first wrote, and back."""
        first = await self.filled(2)
        second = await self.open(first.session_id)
        assert_same(await second.get_items(), messages(2))
        await second.add_items([message("from the second")])
        assert len(await first.get_items()) == 3

    async def test_reading_changes_nothing(self) -> None:
        """Two reads give the same, whatever was read between."""
        session = await self.filled(6)
        before = await session.get_items()
        await session.get_items(limit=2)
        await session.get_items(limit=0)
        assert_same(await session.get_items(), before)

    async def test_window_over_a_long_history(self) -> None:
        """Limits cut right where the history is long and written in many calls."""
        session = await self.open()
        expected = []
        for number in range(30):
            batch = messages(number % 4 + 1, prefix=f"batch {number}")
            await session.add_items(batch)
            expected += batch
        for limit in (1, 2, 7, 50, len(expected)):
            assert_same(await session.get_items(limit), expected[-limit:])

    @needs("corrupt")
    @each(DAMAGES)
    async def test_unreadable_row_is_passed_over(self, damage: str) -> None:
        """Unreadable rows and scalars never reach the caller, and raise nothing."""
        session = await self.filled(4)
        await self.corrupt(session, 1, damage)
        assert texts(await session.get_items()) == ["item 0", "item 2", "item 3"]

    @needs("corrupt")
    @each(DAMAGES)
    async def test_limit_counts_readable_items(self, damage: str) -> None:
        """The window widens over unreadable rows, until N items are found."""
        session = await self.filled(12)
        for nth in (-1, -2, -4, -5, -6):
            await self.corrupt(session, nth, damage)
        assert texts(await session.get_items(limit=1)) == ["item 9"]
        expected = ["item 4", "item 5", "item 9"]
        assert texts(await session.get_items(limit=3)) == expected
        assert len(await session.get_items(limit=LARGEST)) == 7
        assert len(await session.get_items(limit=7)) == 7
        assert len(await session.get_items(limit=8)) == 7

    @needs("corrupt")
    async def test_all_rows_unreadable(self) -> None:
        """A history of which nothing can be read is empty, and can be continued."""
        session = await self.filled(3)
        for nth in range(3):
            await self.corrupt(session, nth, "not json")
        assert await session.get_items() == []
        assert await session.get_items(limit=2) == []
        await session.add_items([message("new")])
        assert texts(await session.get_items(limit=2)) == ["new"]

    @needs("corrupt")
    async def test_reading_deletes_no_unreadable_row(self) -> None:
        """A row that is put right after reads is back in its place."""
        session = await self.filled(3)
        original = await self.corrupt(session, 1, "not json")
        await session.get_items()
        await session.get_items(limit=3)
        await self.corrupt(session, 1, original)
        assert_same(await session.get_items(), messages(3))

    @needs("reopen")
    async def test_foreign_writes_are_seen_at_once(self) -> None:
        """Nothing is cached: each read sees what others have written since."""
        first = await self.filled(1)
        second = await self.open(first.session_id)
        for number in range(3):
            await second.add_items([message(f"more {number}")])
            assert len(await first.get_items()) == number + 2
        await second.pop_item()
        assert len(await first.get_items()) == 3
