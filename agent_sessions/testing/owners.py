"""The owners of sessions, and their ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent_sessions.testing.base import (
    ContractBase,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)

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
