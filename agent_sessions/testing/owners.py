"""Whose sessions are whose, which ids they have, and the synchronous face."""

from __future__ import annotations

import math
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
    async def _refused(
        self, session: Any, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        harmless = any(operation is OPERATIONS[name] for name in HARMLESS)
        try:
            result = await operation(session)
        except self.foreign_error:
            return
        assert harmless, "a foreign session was reached"
        assert not result

    @needs("owner")
    @each(OPERATIONS)
    async def test_owned_session_is_closed_to_others(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """To another user it does not exist, and nothing happens to it."""
        alice, bob = await self.make_user("alice"), await self.make_user("bob")
        owned = await self.filled(2, user=alice)
        await self._refused(await self.open(owned.session_id, user=bob), operation)
        assert_same(await owned.get_items(), messages(2))

    @needs("owner")
    @each(OPERATIONS)
    async def test_owned_session_is_closed_to_nobody(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """Opened without a user it does not exist either."""
        owned = await self.filled(2, user=await self.make_user("alice"))
        await self._refused(await self.open(owned.session_id), operation)
        assert_same(await owned.get_items(), messages(2))

    @needs("owner")
    @each(OPERATIONS)
    async def test_session_without_owner_is_not_taken_over(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """A user can't make somebody else's unowned session their own."""
        unowned = await self.filled(2)
        alice = await self.make_user("alice")
        await self._refused(await self.open(unowned.session_id, user=alice), operation)
        assert_same(await unowned.get_items(), messages(2))

    @needs("owner")
    async def test_error_does_not_say_that_it_exists(self) -> None:
        """The error is the one of "does not exist" and names no owner."""
        owned = await self.filled(1, user=await self.make_user("alice"))
        bobs = await self.open(owned.session_id, user=await self.make_user("bob"))
        with pytest.raises(self.foreign_error) as caught:
            await bobs.get_items()
        assert "alice" not in str(caught.value)
        assert "item 0" not in str(caught.value)

    @needs("owner")
    async def test_users_keep_apart(self) -> None:
        """Each user's sessions hold what that user wrote."""
        users = [await self.make_user(name) for name in ("alice", "bob", "carol")]
        sessions = [await self.open(user=user) for user in users]
        for number, session in enumerate(sessions):
            await session.add_items(messages(2, prefix=f"user {number}"))
        await sessions[0].clear_session()
        assert await sessions[0].get_items() == []
        for number in (1, 2):
            found = await sessions[number].get_items()
            assert_same(found, messages(2, prefix=f"user {number}"))

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


class SyncCases(ContractBase):
    @needs("sync")
    def test_sync_twins(self) -> None:
        """Each twin does what its coroutine does, without a loop."""
        session = self.run_coroutine(self.open)
        assert session.sync.get_items() == []
        assert session.sync.pop_item() is None
        session.sync.add_items(messages(4))
        assert_same(session.sync.get_items(), messages(4))
        assert texts(session.sync.get_items(2)) == ["item 2", "item 3"]
        assert texts(session.sync.get_items(limit=1)) == ["item 3"]
        assert_same(session.sync.pop_item(), message("item 3"))
        session.sync.clear()
        assert session.sync.get_items() == []

    @needs("sync")
    def test_sync_and_async_share_the_history(self) -> None:
        """What one face writes the other reads."""
        session = self.run_coroutine(self.open)
        session.sync.add_items([message("sync")])
        self.run_coroutine(lambda: session.add_items([message("async")]))
        assert texts(session.sync.get_items()) == ["sync", "async"]
        assert texts(self.run_coroutine(session.get_items)) == ["sync", "async"]
        assert_same(session.sync.pop_item(), message("async"))
        self.run_coroutine(session.clear_session)
        assert session.sync.get_items() == []

    @needs("sync")
    def test_sync_twins_follow_the_settings(self) -> None:
        """The limit of the settings counts here too."""
        session = self.run_coroutine(lambda: self.open(session_settings={"limit": 2}))
        session.sync.add_items(messages(4))
        assert texts(session.sync.get_items()) == ["item 2", "item 3"]
        assert len(session.sync.get_items(limit=3)) == 3

    @needs("sync")
    def test_sync_add_refuses_what_is_not_json(self) -> None:
        """All or nothing, as with the coroutine."""
        session = self.run_coroutine(self.open)
        with pytest.raises((ValueError, TypeError)):
            session.sync.add_items([message("good"), {"score": math.nan}])
        assert session.sync.get_items() == []

    @needs("sync", "owner")
    def test_sync_twins_keep_others_out(self) -> None:
        """A foreign session does not exist through this door either."""
        alice = self.run_coroutine(lambda: self.make_user("alice"))
        bob = self.run_coroutine(lambda: self.make_user("bob"))
        owned = self.run_coroutine(lambda: self.filled(2, user=alice))
        foreign = self.run_coroutine(lambda: self.open(owned.session_id, user=bob))
        for call in (
            foreign.sync.get_items,
            foreign.sync.pop_item,
            foreign.sync.clear,
            lambda: foreign.sync.add_items(messages(1)),
        ):
            with pytest.raises(self.foreign_error):
                call()
        assert_same(owned.sync.get_items(), messages(2))


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
        with pytest.raises(ValueError):  # noqa: PT011 - stores word it as they like
            await self._use(session_id)

    async def _use(self, session_id: str) -> None:
        session: Any = await self.make_session(session_id)
        await session.add_items(messages(1))

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
