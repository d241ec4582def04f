"""Owned sessions: through no door does anyone else reach them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent_sessions.testing.contract.base import (
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
