"""The twins without await, for views and the shell."""

from __future__ import annotations

import math

import pytest

from agent_sessions.testing.contract.base import (
    ContractBase,
    assert_same,
    message,
    messages,
    needs,
    texts,
)


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
        assert texts(self.run_coroutine(lambda: session.get_items())) == [
            "sync",
            "async",
        ]
        assert_same(session.sync.pop_item(), message("async"))
        self.run_coroutine(lambda: session.clear_session())
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
