"""What a session looks like to the Runner, and what it reads."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from typing import Any

from agents import RunContextWrapper
from agents.memory import Session, SessionABC, SessionSettings
from agents.memory import session as sdk_session

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
LOOP_BOUND = (
    asyncio.Lock,
    asyncio.Event,
    asyncio.Condition,
    asyncio.Semaphore,
    asyncio.Queue,
    asyncio.Future,
    asyncio.AbstractEventLoop,
)


class ShapeCases(ContractBase):
    async def test_satisfies_the_protocol(self) -> None:
        """`isinstance(session, Session)` holds."""
        assert isinstance(await self.open(), Session)

    async def test_is_a_session_abc(self) -> None:
        """Sessions of this project are subclasses of SessionABC."""
        assert isinstance(await self.open(), SessionABC)

    async def test_session_id_is_readable_at_once(self) -> None:
        """The id is the one given, before anything was stored."""
        session_id = self.new_id()
        session = await self.open(session_id)
        assert session.session_id == session_id

    @each({name: name for name in METHODS})
    async def test_is_a_coroutine_function(self, name: str) -> None:
        """The four methods are coroutine functions."""
        assert inspect.iscoroutinefunction(getattr(await self.open(), name))

    async def test_get_items_names_its_parameter_limit(self) -> None:
        """The Runner passes `limit` by keyword, and it may be left out."""
        parameter = inspect.signature((await self.open()).get_items).parameters["limit"]
        assert parameter.default is None
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD

    async def test_limit_by_keyword_and_by_position(self) -> None:
        """The Runner passes `limit` by keyword, EncryptedSession by position."""
        session = await self.filled(3)
        assert texts(await session.get_items(limit=2)) == ["item 1", "item 2"]
        assert texts(await session.get_items(2)) == ["item 1", "item 2"]

    async def test_arguments_by_keyword(self) -> None:
        """Items may be given by name."""
        session = await self.open()
        await session.add_items(items=messages(1))
        assert texts(await session.get_items()) == ["item 0"]

    async def test_settings_default(self) -> None:
        """Without settings there is either None or settings that limit nothing."""
        settings = (await self.open()).session_settings
        assert settings is None or settings == SessionSettings()

    async def test_settings_are_kept(self) -> None:
        """Settings given are the settings read."""
        session = await self.open(session_settings=SessionSettings(limit=2))
        assert session.session_settings == SessionSettings(limit=2)

    async def test_settings_are_coerced_from_a_dict(self) -> None:
        """The Runner reads `.limit` and `.resolve`, which a dict lacks."""
        session = await self.open(session_settings={"limit": 2})
        assert isinstance(session.session_settings, SessionSettings)
        assert session.session_settings.limit == 2

    async def test_settings_can_be_assigned(self) -> None:
        """EncryptedSession writes the settings through."""
        session = await self.filled(3)
        session.session_settings = SessionSettings(limit=1)
        assert texts(await session.get_items()) == ["item 2"]
        session.session_settings = None
        assert len(await session.get_items()) == 3

    async def test_settings_assigned_as_a_dict_are_coerced(self) -> None:
        """A dict assigned later is as good as one in the constructor."""
        session = await self.filled(3)
        session.session_settings = {"limit": 1}
        assert isinstance(session.session_settings, SessionSettings)
        assert texts(await session.get_items()) == ["item 2"]

    async def test_settings_belong_to_one_object(self) -> None:
        """Assigning settings doesn't change other sessions."""
        session, other = await self.filled(2), await self.filled(2)
        session.session_settings = SessionSettings(limit=1)
        assert len(await other.get_items()) == 2

    @needs("wrapper")
    async def test_all_methods_declare_wrapper(self) -> None:
        """The SDK passes the run context only if all four methods name it."""
        session = await self.open()
        for name in METHODS:
            parameter = inspect.signature(getattr(session, name)).parameters["wrapper"]
            assert parameter.default is None
            assert parameter.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
        # A private name of the SDK; where it's gone, the loop above says the same.
        accepts = getattr(sdk_session, "_session_accepts_wrapper", None)
        assert accepts is None or accepts(session)

    @needs("wrapper")
    async def test_wrapper_is_accepted(self) -> None:
        """A call with the run context does what a call without does."""
        session = await self.open()
        wrapper: RunContextWrapper[Any] = RunContextWrapper(context={"tenant": 1})
        await session.add_items([message("a"), message("b")], wrapper=wrapper)
        assert texts(await session.get_items(limit=1, wrapper=wrapper)) == ["b"]
        assert_same(await session.pop_item(wrapper=wrapper), message("b"))
        await session.clear_session(wrapper=wrapper)
        assert await session.get_items() == []

    async def test_constructor_makes_nothing_loop_bound(self) -> None:
        """An asyncio primitive made early breaks run_sync and other loops."""
        session = await self.open()
        bound = {
            name: value
            for name, value in getattr(session, "__dict__", {}).items()
            if isinstance(value, LOOP_BOUND)
        }
        assert bound == {}

    def test_serves_event_loops_one_after_another(self) -> None:
        """One object works in a second and third loop after the first is closed."""
        session = self.run_coroutine(self.open)
        for number in range(3):
            item = message(f"loop {number}")
            self.run_coroutine(functools.partial(session.add_items, [item]))
        found = self.run_coroutine(session.get_items)
        assert texts(found) == ["loop 0", "loop 1", "loop 2"]
        assert self.run_coroutine(lambda: session.pop_item()) == message("loop 2")


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
