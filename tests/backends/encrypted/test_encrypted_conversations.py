"""Encrypted histories in OpenAI's Conversations, each envelope inside a message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from typing import Any, ClassVar

import pytest
from agents import Agent, Runner, function_tool
from agents.memory import OpenAIConversationsSession as SDKConversationsSession
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.test import override_settings
from openai import AsyncOpenAI

from agent_sessions import EncryptedSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.openai import OpenAIConversationsBackend
from agent_sessions.backends.wrapping import innermost
from agent_sessions.checks import check_backends
from agent_sessions.encryption import is_envelope
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidItem,
    StorageError,
    UnknownEncryptionKey,
)
from agent_sessions.items import Item
from agent_sessions.memory.openai import OpenAIConversationsSession
from agent_sessions.models import AgentSession
from tests.backends.encrypted.test_encrypted import TREASURE, key_id, private
from tests.backends.encrypted.test_encrypted_contract import DATABASE, ENCRYPTED
from tests.encryption.test_encryption import NEW, OLD, said
from tests.servers.conversations import KEY, ConversationsServer, conversations_server
from tests.support.admin_pages import page, staff, url

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]

CALL = {
    "type": "function_call",
    "id": "fc_mine",
    "call_id": "call_1",
    "name": "tool",
    "arguments": TREASURE,
}
PLACE = SessionKey("s")


@function_tool
def look_up(order: str) -> str:
    return f"{order}: {TREASURE}"


@pytest.fixture(scope="module")
def running() -> Iterator[ConversationsServer]:
    with conversations_server() as server:
        yield server


@pytest.fixture
def server(running: ConversationsServer) -> Iterator[ConversationsServer]:
    running.reset()
    running.knows_types = True
    cache.clear()
    with under(running, NEW):
        yield running


def under(server: ConversationsServer, *keys: str, inner: Any = None) -> Any:
    """Return settings with the aliases "openai", "private" over it and "database"."""
    options = {"base_url": server.url, "api_key": KEY}
    store = {"BACKEND": inner or OpenAIConversationsBackend, "OPTIONS": options}
    sealed = {"backend": "openai", "keys": list(keys)}
    return override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": DATABASE},
            "openai": store,
            "private": {"BACKEND": ENCRYPTED, "OPTIONS": sealed},
            "renewed": {
                "BACKEND": ENCRYPTED,
                "OPTIONS": {**sealed, "keys": [NEW], "name": "private"},
            },
        }
    )


@asynccontextmanager
async def using(*arguments: Any, **options: Any) -> AsyncIterator[None]:
    """Use such settings, and close their client while its loop runs."""
    with under(*arguments, **options):
        yield
        await innermost(sessions["private"]).aclose()  # type: ignore[attr-defined]


def kept(server: ConversationsServer) -> list[Any]:
    """Return what the only conversation holds."""
    (items,) = server.conversations.values()
    return items


def envelopes(server: ConversationsServer) -> list[Any]:
    return [json.loads(item["content"][0]["text"]) for item in kept(server)]


def message(text: str, role: str = "developer") -> Any:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "role": role, "content": content, "id": "msg_x"}


# -- what OpenAI sees ------------------------------------------------------------------


async def test_openai_sees_its_own_messages_and_nothing_of_the_contents(
    server: ConversationsServer,
) -> None:
    items: Any = [said(TREASURE), CALL, {**said("typed"), "type": "message"}]
    await private().add_items(items)
    assert TREASURE not in json.dumps(kept(server))
    assert "function_call" not in json.dumps(kept(server))
    for stored in kept(server):
        assert (stored["type"], stored["role"]) == ("message", "developer")
        assert stored["status"] == "completed"
    assert all(map(is_envelope, envelopes(server)))
    # Ids and types come back as they were given, which they don't without encryption.
    assert await private().get_items() == items
    row = await AgentSession.objects.aget()
    assert (row.title, row.item_count) == ("", 3)
    assert {one.turn for one in (await sessions["private"].apage(PLACE)).items} == {0}
    assert await private().pop_item() == items[2]
    await private().clear_session()
    assert server.conversations == {}
    assert check_backends() == []


async def test_the_server_takes_no_envelopes_as_they_are(
    server: ConversationsServer,
) -> None:
    """What the messages are for."""
    await private().add_items([said("one")])
    plain: Any = get_session("plain", backend="openai")
    for refused in (envelopes(server)[0], {"type": "envelope"}, {**said("x"), "v": 1}):
        with pytest.raises(StorageError, match="only items that it knows"):
            await plain.add_items([refused])
    await plain.add_items([said("two")])


async def test_an_item_that_looks_like_a_carried_one_stays_what_it_is(
    server: ConversationsServer,
) -> None:
    await private().add_items([said("one")])
    (stored,) = kept(server)
    (envelope,) = envelopes(server)
    await private().add_items(alike := [stored, envelope, said(json.dumps(envelope))])
    assert (await private().get_items())[1:] == alike


# -- what others wrote -----------------------------------------------------------------


async def test_what_people_write_there_is_taken_for_no_envelope(
    server: ConversationsServer,
) -> None:
    """As in other stores: passed over by a read, and left there by a pop."""
    await private().add_items([said("one")])
    (text,) = (item["content"][0]["text"] for item in kept(server))
    forged = text.replace('"payload":"g', '"payload":"h')
    assert forged != text
    others = [
        message(text, role="user"),
        message(f" {text}"),
        message('{"__enc__":1,"v":2}'),
        message('{"__enc__":1,'),
        message(forged),
        {**message(text), "content": text},
        {**message(text), "content": [*message(text)["content"]] * 2},
        {**CALL, "arguments": text},
    ]
    for number, other in enumerate(others):
        kept(server).append({**other, "id": f"msg_{number}"})
        assert await private().get_items() == [said("one")]
        assert await private().get_items(limit=1) == [said("one")]
        shown = (await sessions["private"].apage(PLACE)).items
        assert [one.item for one in shown] == [said("one"), None]
        before = list(kept(server))
        with pytest.raises(EncryptionError, match="Nothing was removed"):
            await private().pop_item()
        assert kept(server) == before
        kept(server).pop()


async def test_a_message_of_another_session_does_not_open(
    server: ConversationsServer,
) -> None:
    await private("other").add_items([said("theirs")])
    stolen = kept(server)[0]
    await private().add_items([said("mine")])
    list(server.conversations.values())[1].append(stolen)
    assert await private().get_items() == [said("mine")]


async def test_a_wrong_key_is_named_and_destroys_nothing(
    server: ConversationsServer,
) -> None:
    async with using(server, OLD):
        await private().add_items([said("one"), said("two")])
    before = list(kept(server))
    for call in (private().get_items, private().pop_item, private().clear_session):
        with pytest.raises(UnknownEncryptionKey, match=key_id(OLD)):
            await call()
    shown = await sessions["private"].apage(PLACE)
    # For readers to tell: the envelope, not the message around it.
    assert [one.item for one in shown.items] == envelopes(server)
    with pytest.raises(EncryptionError, match=key_id(OLD)):
        shown.assert_open()
    assert kept(server) == before


def test_the_admin_shows_locks_without_the_key(server: ConversationsServer) -> None:
    private("chat").sync.add_items([said(TREASURE)])
    row = AgentSession.objects.get()
    client = staff("view", "read")
    assert TREASURE in page(client, url("change", row))
    with under(server, OLD):
        html = page(client, url("change", row))
    assert TREASURE not in html
    assert key_id(NEW) in html
    assert "Encrypted" in html


class Faster(OpenAIConversationsBackend):
    """Somebody else writes before each pop."""

    theirs: ClassVar[list[Item]] = []

    async def apop(self, key: SessionKey) -> Item | None:
        await self.aappend(key, Faster.theirs)
        return await super().apop(key)

    def pop(self, key: SessionKey) -> Item | None:
        self.append(key, Faster.theirs)
        return super().pop(key)


async def test_a_pop_that_takes_anothers_item_puts_it_back(
    server: ConversationsServer,
) -> None:
    async with using(server, OLD):
        await private().add_items([said("theirs")])
        theirs = kept(server)[0]
        await private().pop_item()
    given = {name: theirs[name] for name in ("type", "role", "content")}
    async with using(server, NEW, inner=Faster):
        await private().add_items([said("mine")])
        Faster.theirs = [given]
        with pytest.raises(UnknownEncryptionKey):
            await private().pop_item()
        assert kept(server)[-1]["content"] == theirs["content"]
    async with using(server, NEW, OLD):
        assert await private().get_items() == [said("mine"), said("theirs")]


def test_a_pop_that_takes_a_persons_message_puts_it_back(
    server: ConversationsServer,
) -> None:
    with under(server, NEW, inner=Faster):
        private().sync.add_items([said("mine")])
        Faster.theirs = [said("a person's")]
        with pytest.raises(EncryptionError, match="don't open"):
            private().sync.pop_item()
        assert kept(server)[-1]["content"][0]["text"] == "a person's"
        assert private().sync.get_items() == [said("mine")]


# -- runs, keys and copies -------------------------------------------------------------


async def test_runs_go_on_where_others_ended(server: ConversationsServer) -> None:
    turns: Any = [
        [function_call("look_up", {"order": "A"}, call_id="call_1")],
        [assistant_message(TREASURE)],
        [assistant_message("Still there.")],
    ]
    model = ScriptedModel(turns)
    agent: Any = Agent(name="a", model=model, tools=[look_up])
    await Runner.run(agent, "Where is it?", session=private())
    await Runner.run(agent, "And now?", session=private())
    items = await private().get_items()
    assert [item.get("role") or item["type"] for item in items] == [
        *("user", "function_call", "function_call_output", "assistant"),
        *("user", "assistant"),
    ]
    assert len(server.conversations) == 1
    assert TREASURE not in json.dumps(kept(server))


def test_a_rotation_is_refused_by_name_and_a_copy_does_it(
    server: ConversationsServer,
) -> None:
    """The service has no request that puts an item in the place of another."""
    with under(server, OLD):
        private(user=None).sync.add_items([said(TREASURE), CALL])
    with under(server, NEW, OLD):
        private().sync.add_items([said("new")])
        kept(server).append(message('{"__enc__":1,'))
        before, out = list(kept(server)), StringIO()
        with pytest.raises(CommandError, match="Keep the older keys") as caught:
            call_command(
                "rotate_agent_session_keys", "--backend=private", stderr=out, stdout=out
            )
        assert caught.value.returncode == 3
        told = "private: 3 items under other keys, which OpenAIConversationsBackend"
        assert told in out.getvalue()
        assert kept(server) == before
        kept(server).pop()
        copy = ("copy_agent_sessions", "--all", "--from=private")
        call_command(*copy, "--to=renewed")
        call_command(*copy, "--to=default", "--in-clear")
    with under(server, NEW):
        items = get_session("s", backend="renewed").sync.get_items()
        assert items == [said(TREASURE), CALL, said("new")]
        assert get_session("s").sync.get_items() == items
        assert len(server.conversations) == 2


# -- around session objects ------------------------------------------------------------


def opened(kind: str, client: AsyncOpenAI, conversation: str | None) -> Any:
    if kind == "sdk":
        return SDKConversationsSession(
            conversation_id=conversation, openai_client=client
        )
    if kind == "ours":
        return OpenAIConversationsSession(conversation, client)
    return get_session("s", backend="openai")


@pytest.mark.parametrize("kind", ["sdk", "ours", "alias"])
async def test_around_a_session_object(server: ConversationsServer, kind: str) -> None:
    items: Any = [said(TREASURE), CALL, said("three")]
    async with AsyncOpenAI(api_key=KEY, base_url=server.url) as client:
        session = EncryptedSession(opened(kind, client, None), NEW)
        assert await session.get_items() == []
        assert await session.pop_item() is None
        await session.clear_session()
        await session.add_items([])
        assert await session._get_compaction_snapshot(5) is None
        assert not await session._atomic_replace_items([said("all")])
        bad: Any = object()
        with pytest.raises(InvalidItem):
            await session.add_items([said("one"), bad])
        assert server.made == 0
        await session.add_items(items)
        assert TREASURE not in json.dumps(kept(server))
        assert session.session_id in repr(session)
        again = EncryptedSession(
            opened(kind, client, next(iter(server.conversations))), keys=[NEW]
        )
        assert await again.get_items() == items
        assert await again.get_items(limit=2) == items[1:]
        assert await again.pop_item() == items[2]
        wrong = EncryptedSession(session.inner_session, OLD)
        for call in (wrong.get_items, wrong.pop_item, wrong.clear_session):
            with pytest.raises(UnknownEncryptionKey, match=key_id(NEW)):
                await call()
        await session.clear_session()
        assert await session.get_items() == []
        await session.add_items([said("anew")])
        assert await session.get_items() == [said("anew")]
        assert len(server.conversations) == 1


def test_a_conversation_that_is_not_made_yet_has_no_name() -> None:
    session = EncryptedSession(OpenAIConversationsSession(), NEW)
    assert repr(session) == "<EncryptedSession 'not made yet'>"
    with pytest.raises(ValueError, match="not made yet"):
        _ = session.session_id


@pytest.mark.parametrize("kind", ["sdk", "ours"])
async def test_a_clear_beside_writers_leaves_nothing_that_does_not_open(
    server: ConversationsServer, kind: str
) -> None:
    """Each clear gives another id, by which the items are bound."""
    async with AsyncOpenAI(api_key=KEY, base_url=server.url) as client:
        session = EncryptedSession(opened(kind, client, None), NEW)
        for number in range(5):
            await asyncio.gather(
                session.add_items([said(f"{number} one")]),
                session.clear_session(),
                session.add_items([said(f"{number} two"), said(f"{number} three")]),
                session.clear_session(),
                session.add_items([said(f"{number} four")]),
            )
            assert len(await session.get_items()) == len(kept(server)) == 1
