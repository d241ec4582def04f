"""What a session looks like to the Runner, and what it reads."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from agents import RunContextWrapper
from agents.memory import Session, SessionABC, SessionSettings

from agent_sessions.testing.base import (
    ContractBase,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)

METHODS = ("get_items", "add_items", "pop_item", "clear_session")
LARGEST = 2_147_483_647

# What can lie in a row that no reader can use. The Runner would send scalars and None
# to the model.
DAMAGES = {
    "cut_off": '{"role": "user", "cont',
    "not_json": "not json",
    "empty": "",
    "null": "null",
    "number": "42",
    "string": '"text"',
    "list": "[1]",
}


class ShapeCases(ContractBase):
    async def test_is_a_session(self) -> None:
        """It is a SessionABC, satisfies the protocol, and has its id at once."""
        session_id = self.new_id()
        session = await self.open(session_id)
        assert isinstance(session, SessionABC)
        assert isinstance(session, Session)
        assert session.session_id == session_id

    async def test_arguments_by_keyword_and_by_position(self) -> None:
        """The Runner passes `limit` by keyword, EncryptedSession by position."""
        session = await self.open()
        await session.add_items(items=messages(3))
        assert texts(await session.get_items(limit=2)) == ["item 1", "item 2"]
        assert texts(await session.get_items(2)) == ["item 1", "item 2"]

    async def test_settings_default(self) -> None:
        """Without settings there is either None or settings that limit nothing."""
        settings = (await self.open()).session_settings
        assert settings is None or settings == SessionSettings()

    async def test_settings_can_be_assigned(self) -> None:
        """EncryptedSession writes the settings through; other sessions keep theirs."""
        session, other = await self.filled(3), await self.filled(3)
        session.session_settings = SessionSettings(limit=1)
        assert texts(await session.get_items()) == ["item 2"]
        assert len(await other.get_items()) == 3
        session.session_settings = None
        assert len(await session.get_items()) == 3

    async def test_settings_are_coerced_from_a_dict(self) -> None:
        """The Runner reads `.limit` and `.resolve`, which a dict lacks."""
        session = await self.open(session_settings={"limit": 2})
        assert session.session_settings == SessionSettings(limit=2)

    async def test_settings_assigned_as_a_dict_are_coerced(self) -> None:
        """A dict assigned later is as good as one in the constructor."""
        session = await self.filled(3)
        session.session_settings = {"limit": 1}
        assert isinstance(session.session_settings, SessionSettings)
        assert texts(await session.get_items()) == ["item 2"]

    @needs("wrapper")
    async def test_wrapper_is_accepted(self) -> None:
        """The SDK passes the run context if all four methods name it."""
        session = await self.open()
        for name in METHODS:
            parameter = inspect.signature(getattr(session, name)).parameters["wrapper"]
            assert parameter.default is None
        wrapper: RunContextWrapper[Any] = RunContextWrapper(context={"tenant": 1})
        await session.add_items([message("a"), message("b")], wrapper=wrapper)
        assert texts(await session.get_items(limit=1, wrapper=wrapper)) == ["b"]
        assert_same(await session.pop_item(wrapper=wrapper), message("b"))
        await session.clear_session(wrapper=wrapper)
        assert await session.get_items() == []

    def test_serves_event_loops_one_after_another(self) -> None:
        """One object works in a second and third loop after the first is closed."""
        session = self.run_coroutine(self.open)
        for number in range(3):
            item = message(f"loop {number}")
            self.run_coroutine(functools.partial(session.add_items, [item]))
        found = self.run_coroutine(session.get_items)
        assert texts(found) == ["loop 0", "loop 1", "loop 2"]
        assert self.run_coroutine(lambda: session.pop_item()) == message("loop 2")


class ReadingCases(ContractBase):
    @each({"one": 1, "all_but_one": 9, "all": 10, "more": 11, "largest": LARGEST})
    async def test_limit_gives_the_newest(self, limit: int) -> None:
        """N gives the newest N, oldest of them first; the SDK's "all" is the largest."""
        session = await self.filled(10)
        assert_same(await session.get_items(limit=limit), messages(10)[-limit:])

    async def test_limit_zero_gives_nothing(self) -> None:
        """Zero is a limit, not the lack of one."""
        session = await self.filled(3)
        assert await session.get_items(limit=0) == []
        session.session_settings = SessionSettings(limit=0)
        assert await session.get_items() == []

    async def test_negative_limit_gives_nothing(self) -> None:
        """A negative limit is refused or gives nothing; it never means everything."""
        session = await self.filled(3)
        try:
            found = await session.get_items(limit=-1)
        except ValueError:
            return
        assert found == []

    async def test_settings_limit_applies(self) -> None:
        """`session_settings.limit` counts where no limit is given, and only there."""
        session = await self.filled(5, session_settings=SessionSettings(limit=2))
        assert texts(await session.get_items()) == ["item 3", "item 4"]
        assert len(await session.get_items(limit=4)) == 4
        assert len(await session.get_items(limit=1)) == 1
        assert await session.get_items(limit=0) == []

    async def test_fresh_dicts(self) -> None:
        """Callers get a list of plain dicts and may change them, deep down."""
        session = await self.open()
        item = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        await session.add_items([copy.deepcopy(item)])
        first = await session.get_items()
        assert type(first) is list
        assert type(first[0]) is dict
        first[0]["content"][0]["text"] = "changed"
        first[0]["role"] = "changed"
        first.append(message("more"))
        assert_same(await session.get_items(), [item])

    async def test_window_over_a_long_history(self) -> None:
        """Limits are right where the history is long and written in many calls."""
        session = await self.open()
        expected = []
        for number in range(30):
            batch = messages(number % 4 + 1, prefix=f"batch {number}")
            await session.add_items(batch)
            expected += batch
        for limit in (1, 2, 7, 50, len(expected)):
            assert_same(await session.get_items(limit), expected[-limit:])
        assert_same(await session.get_items(), expected)

    @needs("reopen")
    async def test_foreign_writes_are_seen_at_once(self) -> None:
        """Each read sees what other objects of the same id have written since."""
        first = await self.open()
        second = await self.open(first.session_id)
        assert await second.get_items() == []
        for number in range(3):
            await second.add_items([message(f"more {number}")])
            assert len(await first.get_items()) == number + 1
        await second.pop_item()
        assert_same(await first.get_items(), await second.get_items())
        await second.clear_session()
        assert await first.get_items() == []
        await first.add_items([message("after")])
        assert texts(await second.get_items()) == ["after"]

    @needs("corrupt")
    @each(DAMAGES)
    async def test_unreadable_row_is_passed_over(self, damage: str) -> None:
        """Unreadable rows and scalars never reach the caller, and raise nothing.

        A row that is put right after reads is back in its place.
        """
        session = await self.filled(4)
        original = await self.corrupt(session, 1, damage)
        assert texts(await session.get_items()) == ["item 0", "item 2", "item 3"]
        assert len(await session.get_items(limit=4)) == 3
        await self.corrupt(session, 1, original)
        assert_same(await session.get_items(), messages(4))

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
        for limit in (7, 8, LARGEST):
            assert len(await session.get_items(limit=limit)) == 7

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
