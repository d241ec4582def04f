"""Wrong values at the public entrances: each is told in words of ours, at once."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from agents import SQLiteSession
from asgiref.sync import async_to_sync
from cryptography.fernet import Fernet

from agent_sessions import DjangoSession, EncryptedSession, get_session
from agent_sessions.exceptions import InvalidBackend, InvalidBranch, InvalidItem
from agent_sessions.handler import sessions
from tests.histories import user

pytestmark = pytest.mark.django_db

ITEM: Any = user("one")
NO_LISTS = (ITEM, "text", b"bytes", 5, True, object())
NO_NAMES = (5, b"x", ["x"], "\x00", "\ud800")


@pytest.mark.parametrize("items", NO_LISTS)
def test_items_that_are_no_list(items: Any) -> None:
    session: Any = get_session("s")
    encrypted = EncryptedSession(SQLiteSession("s"), Fernet.generate_key())
    for add in (
        session.sync.add_items,
        async_to_sync(session.add_items),
        async_to_sync(encrypted.add_items),
    ):
        with pytest.raises(InvalidItem, match=f"not a {type(items).__name__}"):
            add(items)
    assert session.sync.get_items() == []


def test_items_are_read_once() -> None:
    """As with the SDK's classes, a tuple and an iterator will do, and None is none."""
    session: Any = get_session("s")
    for add in (session.sync.add_items, async_to_sync(session.add_items)):
        add((ITEM,))
        add(iter([ITEM]))
        add(None)
        assert session.sync.get_items() == [ITEM, ITEM]
        session.sync.clear_session()


@pytest.mark.parametrize("alias", [None, 5, b"default", ["default"], {}])
def test_alias_that_is_no_text(alias: Any) -> None:
    with pytest.raises(InvalidBackend, match="has no alias"):
        get_session("s", backend=alias)
    with pytest.raises(InvalidBackend, match="has no alias"):
        sessions.expect(alias)


def test_database_that_is_no_text() -> None:
    with pytest.raises(InvalidBackend, match="DATABASES has no alias '5'"):
        DjangoSession("s", database=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NO_NAMES)
def test_branch_that_can_be_none(name: Any) -> None:
    session: Any = get_session("s")
    session.sync.add_items([ITEM])
    calls = (
        lambda: get_session("s", branch=name),
        lambda: session.sync.get_items(branch_id=name),
        lambda: session.sync.switch_to_branch(name),
        lambda: session.sync.delete_branch(name),
        lambda: session.sync.restore_branch(name),
        lambda: session.sync.create_branch_from_turn(1, name),
        lambda: session.sync.fork(1, name),
        lambda: session.sync.get_session_usage(name),
    )
    for call in calls:
        with pytest.raises(InvalidBranch, match="A branch name"):
            call()


@pytest.mark.parametrize("limit", [sys.maxsize, 2**63, 10**30])
def test_limit_beyond_all_histories(limit: int) -> None:
    session: Any = get_session("s")
    session.sync.add_items([ITEM])
    encrypted = EncryptedSession(session, Fernet.generate_key())
    assert session.sync.get_items(limit) == [ITEM]
    assert async_to_sync(session.get_items)(limit) == [ITEM]
    session.sync.clear_session()
    async_to_sync(encrypted.add_items)([ITEM])
    assert async_to_sync(encrypted.get_items)(limit) == [ITEM]
