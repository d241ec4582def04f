"""Wrong values at the public entrances: each is told in words of ours, at once."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import pytest
from agents import SQLiteSession
from agents.memory import OpenAIResponsesCompactionSession
from asgiref.sync import async_to_sync
from cryptography.fernet import Fernet
from openai import AsyncOpenAI, OpenAI

from agent_sessions import (
    DaprSession,
    DjangoSession,
    EncryptedSession,
    OpenAIConversationsSession,
    SessionHooks,
    get_session,
)
from agent_sessions.exceptions import InvalidBackend, InvalidBranch, InvalidItem
from agent_sessions.handler import sessions
from agent_sessions.windows import Window, chain, token_budget
from tests.support.histories import user

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


@pytest.mark.parametrize(
    "session", ["s", None, 5, SQLiteSession("q"), DjangoSession], ids=repr
)
def test_hooks_on_what_is_no_session_of_ours(session: Any) -> None:
    with pytest.raises(TypeError, match=r"get_session\(\) returns"):
        SessionHooks(session)


def test_hooks_find_the_session_within_one_that_compacts() -> None:
    client = AsyncOpenAI(api_key="none")
    session, key = get_session("s"), Fernet.generate_key()
    encrypted = EncryptedSession(session, key)
    for inner in (session, encrypted):
        outer = OpenAIResponsesCompactionSession("s", inner, client=client)
        for given in (inner, outer):
            assert SessionHooks(given).session is inner


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ({"inner_session": 5}, TypeError),
        ({"inner_session": SQLiteSession}, TypeError),
        ({"session_id": 5}, TypeError),
        ({"ttl": "30d"}, TypeError),
        ({"ttl": timedelta(days=1)}, TypeError),
        ({"lifetime": True}, TypeError),
        ({"ttl": -1}, ValueError),
        ({"ttl": float("nan")}, ValueError),
        ({"max_scan_items": "5"}, TypeError),
        ({"max_scan_items": True}, TypeError),
        ({"max_scan_items": 0}, ValueError),
    ],
    ids=repr,
)
def test_arguments_of_encrypted_sessions(
    named: dict[str, Any], error: type[Exception]
) -> None:
    """A negative ttl would hide every item without a word."""
    arguments: Any = {
        "inner_session": SQLiteSession("s"),
        "encryption_key": Fernet.generate_key(),
    } | named
    with pytest.raises(error, match=r"session|ttl|max_scan_items"):
        EncryptedSession(**arguments)


@pytest.mark.parametrize("client", [5, "localhost:50001", object()], ids=repr)
def test_clients_that_are_none(client: Any) -> None:
    with pytest.raises(InvalidBackend, match="option client is not valid"):
        DaprSession("s", "store", client)
    with pytest.raises(TypeError, match="client is an AsyncOpenAI"):
        OpenAIConversationsSession(client=client)


def test_a_client_that_blocks() -> None:
    """It would be told once its request had been sent, and a conversation made."""
    with pytest.raises(TypeError, match="client is an AsyncOpenAI, not a OpenAI"):
        OpenAIConversationsSession(client=OpenAI(api_key="none"))  # type: ignore[arg-type]


def test_windows_of_what_can_t_be_called() -> None:
    wrong: Any
    for wrong in (5, "last_turns", None, Window):
        with pytest.raises(TypeError, match=r"chain\(\) takes callbacks, not"):
            chain(wrong)
    wrong = "gpt-5"
    with pytest.raises(TypeError, match="counter is a function of an item"):
        token_budget(100, counter=wrong)
