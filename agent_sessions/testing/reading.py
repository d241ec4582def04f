"""What a session looks like to the Runner, what it reads, its id and its owner."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
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


# -- owners and ids ------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "get": lambda session: session.get_items(),
    "get_limited": lambda session: session.get_items(limit=1),
    "get_nothing": lambda session: session.get_items(limit=0),
    "add": lambda session: session.add_items([message("mine now")]),
    "add_nothing": lambda session: session.add_items([]),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
}
# These do no work, so whether they look at the owner is the store's choice.
HARMLESS = ("get_nothing", "add_nothing")


class OwnerCases(ContractBase):
    @needs("owner")
    @each(OPERATIONS)
    async def test_session_is_closed_to_others(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """To anyone but its owner it does not exist, and nothing happens to it.

        Nor can a user take over a session that has no owner.
        """
        harmless = any(operation is OPERATIONS[name] for name in HARMLESS)
        alice, bob = await self.make_user("alice"), await self.make_user("bob")
        for owner, other in ((alice, bob), (alice, None), (None, bob)):
            owned = await self.filled(2, user=owner)
            foreign = await self.open(owned.session_id, user=other)
            try:
                result = await operation(foreign)
            except self.foreign_error as error:
                result = str(error)
            else:
                assert harmless, "a foreign session was reached"
                assert not result
            assert "alice" not in str(result)
            assert_same(await owned.get_items(), messages(2))

    @needs("owner")
    async def test_owner_opens_it_again(self) -> None:
        """The owner reaches it from a new object."""
        alice = await self.make_user("alice")
        owned = await self.filled(2, user=alice)
        again = await self.open(owned.session_id, user=alice)
        await again.add_items([message("more")])
        assert texts(await owned.get_items()) == ["item 0", "item 1", "more"]

    @needs("owner")
    async def test_cleared_session_keeps_its_owner(self) -> None:
        """Clearing frees the id for nobody else."""
        alice, bob = await self.make_user("alice"), await self.make_user("bob")
        owned = await self.filled(2, user=alice)
        await owned.clear_session()
        with pytest.raises(self.foreign_error):
            await (await self.open(owned.session_id, user=bob)).add_items(messages(1))
        await owned.add_items([message("afresh")])
        assert texts(await owned.get_items()) == ["afresh"]

    @needs("owner")
    async def test_reading_reserves_nothing(self) -> None:
        """Reading an id that nobody wrote to is empty for all and creates nothing."""
        alice, bob = await self.make_user("alice"), await self.make_user("bob")
        session_id = self.new_id()
        assert await (await self.open(session_id, user=alice)).get_items() == []
        bobs = await self.open(session_id, user=bob)
        assert await bobs.get_items() == []
        await bobs.add_items([message("bob's")])
        with pytest.raises(self.foreign_error):
            await (await self.open(session_id, user=alice)).get_items()


ACCEPTED = {
    "one_character": "x",
    "255_characters": "x" * 255,
    "255_emoji": "👩" * 255,
    "unicode": "Gespräch-世界-שלום",
    "blanks_and_line_ends": " a b\tc\nd ",
    "separators": "a/b:c|d;e,f#g{h}i",
    "patterns": "*[ab]?%_\\",
    "quotes": "'; DROP TABLE x; --\"`",
    "path": "../../etc/passwd",
    "format": "%s %(x)s {x} $1",
}

REFUSED = {
    "empty": "",
    "256_characters": "x" * 256,
    "nul": "a\x00b",
    "lone_surrogate": "a\ud800b",
}

# Collations of databases, and key patterns of other stores, take these for the same.
PAIRS = {
    "case": ("a", "A"),
    "case_of_unicode": ("é", "É"),
    "accent": ("e", "é"),
    "trailing_blank": ("a", "a "),
    "leading_blank": ("a", " a"),
    "trailing_tab": ("a", "a\t"),
    "composed": ("\u00e9", "e\u0301"),
    "sharp_s": ("ss", "ß"),
    "width": ("a", "\uff41"),
    "emoji": ("😀", "😁"),
    "zero_width": ("a", "a\u200b"),
    "pattern": ("a*", "ab"),
    "wildcard": ("a_", "ab"),
    "prefix": ("a", "a:b"),
    "number": ("1", "01"),
}


class IdCases(ContractBase):
    @each(ACCEPTED)
    async def test_id_is_accepted(self, session_id: str) -> None:
        """Any text of 1 to 255 characters is an id, and comes back as it was."""
        session = await self.open(session_id)
        await session.clear_session()
        await session.add_items(messages(2))
        assert session.session_id == session_id
        assert len(await session.get_items()) == 2
        assert await session.pop_item() == message("item 1")
        await session.clear_session()
        assert await session.get_items() == []

    @each(REFUSED)
    async def test_id_is_refused(self, session_id: str) -> None:
        """What no database can keep raises ValueError, at the first use at latest."""

        async def use() -> None:
            session: Any = await self.make_session(session_id)
            await session.add_items(messages(1))

        with pytest.raises(ValueError):  # noqa: PT011 - stores word it as they like
            await use()

    @needs("reopen")
    @each(PAIRS)
    async def test_ids_are_told_apart(self, pair: tuple[str, str]) -> None:
        """Ids are compared as they are, whatever a collation thinks of them."""
        prefix = self.new_id()
        # Both at the end, where databases pad with blanks.
        first, second = [await self.open(prefix + end) for end in pair]
        await first.add_items([message("first")])
        assert await second.get_items() == []
        await second.add_items([message("second")])
        assert texts(await first.get_items()) == ["first"]
        assert texts(await second.get_items()) == ["second"]
        await first.clear_session()
        assert await first.get_items() == []
        again = await self.open(prefix + pair[1])
        assert texts(await again.get_items()) == ["second"]
