"""Our classes and the SDK's, asked the same: what is public behaves alike.

Where ours differs on purpose, docs/sdk-sessions.md has a table, and the end of this
module its cases.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from agents import Agent, Runner
from agents.extensions.memory import EncryptedSession as SDKEncrypted
from agents.extensions.memory import RedisSession as SDKRedis
from agents.extensions.memory.dapr_session import DaprSession as SDKDapr
from agents.memory import (
    OpenAIConversationsSession as SDKConversations,
)
from agents.memory import (
    SessionABC,
    SessionSettings,
    SQLiteSession,
)
from agents.testing import ScriptedModel, assistant_message
from cryptography.fernet import Fernet
from dapr.aio.clients import DaprClient
from openai import AsyncOpenAI

from agent_sessions import (
    DaprSession,
    DjangoSession,
    EncryptedSession,
    OpenAIConversationsSession,
    RedisSession,
)
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidBackend,
    InvalidItem,
    InvalidLimit,
    SessionClosed,
    UnknownEncryptionKey,
)
from tests.servers import Server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import url

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.one_database,
]

KEY = Fernet.generate_key().decode()
OTHER = Fernet.generate_key().decode()


def said(*texts: object) -> list[Any]:
    return [{"role": "user", "content": str(text)} for text in texts]


ITEMS: list[Any] = [
    *said("Hi", "こんにちは 👋", ""),
    {"type": "function_call", "name": "f", "call_id": "c", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "c", "output": "ü"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "x", "n": None}]},
    {"future": {"nested": [1, 2.5, True, None]}},
]


class Places:
    """Where the sessions of a test lie, by the name of their class."""

    def __init__(self, redis_url: str, dapr: DaprSidecar, folder: Path) -> None:
        self.redis_url = redis_url
        self.dapr = dapr
        self.folder = folder
        self.clients: list[Any] = []

    async def given(self, name: str, ours: bool, session_id: str, **more: Any) -> Any:
        """Open a session over a client that the caller keeps, by SDK's keywords."""
        if name == "redis":
            client: Any = redis.asyncio.Redis.from_url(self.redis_url)
            self.clients.append(client.aclose)
            redis_kind: Any = RedisSession if ours else SDKRedis
            return redis_kind(session_id=session_id, redis_client=client, **more)
        if name == "dapr":
            client = DaprClient(self.dapr.address)
            self.clients.append(client.close)
            dapr_kind: Any = DaprSession if ours else SDKDapr
            return dapr_kind(
                session_id=session_id,
                state_store_name=STORE,
                dapr_client=client,
                **more,
            )
        if name == "django":
            if ours:
                return DjangoSession(session_id, **more)
            return SQLiteSession(session_id, self.folder / "s.sqlite3", **more)
        inner = SQLiteSession(session_id, self.folder / f"{ours}.sqlite3")
        inner.session_settings = SessionSettings()
        kind: Any = EncryptedSession if ours else SDKEncrypted
        settings = more.pop("session_settings", None)
        session = kind(
            session_id=session_id, underlying_session=inner, encryption_key=KEY, **more
        )
        if settings is not None:
            session.session_settings = settings
        return session

    def owned(self, name: str, ours: bool, session_id: str, **more: Any) -> Any:
        """Open a session with a client of its own."""
        if name == "redis":
            redis_kind: Any = RedisSession if ours else SDKRedis
            return redis_kind.from_url(session_id, url=self.redis_url, **more)
        dapr_kind: Any = DaprSession if ours else SDKDapr
        return dapr_kind.from_address(
            session_id, state_store_name=STORE, dapr_address=self.dapr.address, **more
        )

    async def aclose(self) -> None:
        for close in self.clients:
            await close()


@pytest.fixture
def places(redis_server: Server, dapr_server: DaprSidecar, tmp_path: Path) -> Places:
    return Places(url(redis_server, 4), dapr_server, tmp_path)


async def outcome(awaitable: Awaitable[Any]) -> Any:
    """Return what comes of a call: its result, or the error's public kind."""
    try:
        return await awaitable
    except RuntimeError:
        return RuntimeError
    except ValueError:
        return ValueError


async def script(session: Any) -> list[Any]:
    """Use all that the protocol has; give what came of it."""
    told: list[Any] = [isinstance(session, SessionABC), type(session.session_settings)]
    told += [await session.get_items(), await session.pop_item()]
    told.append(await session.add_items([]))
    told.append(await session.add_items([dict(item) for item in ITEMS]))
    for limit in (None, 1, 3, 0, len(ITEMS), 2_147_483_647):
        told.append(await session.get_items(limit))
        told.append(await session.get_items(limit=limit))
    # What is given is the caller's to change.
    (await session.get_items())[0]["content"] = "changed"
    told.append(await session.get_items(1))
    session.session_settings = SessionSettings(limit=2)
    told += [await session.get_items(), await session.get_items(limit=4)]
    session.session_settings = SessionSettings()
    told += [await session.pop_item(), await session.pop_item()]
    await session.add_items(said("after"))
    told.append(await session.get_items())
    told.append(await session.clear_session())
    told += [await session.get_items(), await session.pop_item()]
    told.append(await session.clear_session())
    await session.add_items(said("again"))
    told.append(await session.get_items())
    told += [session.session_id, session.session_settings]
    return told


@pytest.mark.parametrize("name", ["django", "redis", "dapr", "encrypted"])
async def test_the_same_script_tells_the_same(places: Places, name: str) -> None:
    session_id = uuid.uuid4().hex
    # One after the other: both know each other's histories.
    told = []
    for ours in (False, True):
        session = await places.given(name, ours, session_id)
        told.append(await script(session))
        await session.clear_session()
    await places.aclose()
    assert told[1] == told[0]


@pytest.mark.parametrize("settings", [SessionSettings(limit=2), {"limit": 2}])
@pytest.mark.parametrize("name", ["django", "redis", "dapr"])
async def test_settings_are_taken_alike(
    places: Places, name: str, settings: Any
) -> None:
    told = []
    for ours in (False, True):
        session = await places.given(
            name, ours, uuid.uuid4().hex, session_settings=settings
        )
        await session.add_items(said(1, 2, 3))
        told.append((session.session_settings, await session.get_items()))
    await places.aclose()
    assert told[1] == told[0]


@pytest.mark.parametrize("name", ["django", "redis", "dapr", "encrypted"])
async def test_a_runner_works_with_both_alike(places: Places, name: str) -> None:
    told = []
    for ours in (False, True):
        session = await places.given(name, ours, uuid.uuid4().hex)
        model = ScriptedModel([[assistant_message("one")], [assistant_message("two")]])
        agent: Agent[Any] = Agent(name="a", model=model)
        for text in ("first", "second"):
            await Runner.run(agent, text, session=session)
        kept = [{**item, "id": None} for item in await session.get_items()]
        told.append((kept, [len(each.input) for each in model.calls]))
    await places.aclose()
    assert told[1] == told[0]


# -- ping and close --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["redis", "dapr"])
async def test_closing_ends_a_session_with_a_client_of_its_own(
    places: Places, name: str
) -> None:
    told = []
    for ours in (False, True):
        session = places.owned(name, ours, uuid.uuid4().hex, ttl=60)
        await session.add_items(said("a"))
        found = [await session.ping(), await session.get_items()]
        found += [await session.close(), await session.close()]
        found += [
            await outcome(call())
            for call in (
                session.get_items,
                lambda session=session: session.get_items(limit=0),
                lambda session=session: session.add_items(said("b")),
                session.pop_item,
                session.clear_session,
                session.ping,
                session.close,
            )
        ]
        told.append(found)
    assert told[1] == told[0]
    assert told[1][4:] == [RuntimeError] * 6 + [None]


@pytest.mark.parametrize("name", ["redis", "dapr"])
async def test_nothing_can_be_done_with_a_closed_session(
    places: Places, name: str
) -> None:
    session = places.owned(name, True, uuid.uuid4().hex)
    sync = session.sync
    await session.close()
    for call in (
        lambda: session.add_items([]),
        lambda: session.get_items(0),
        session.clear,
        session.ping,
    ):
        with pytest.raises(SessionClosed, match="closed"):
            await call()
    for call in (
        sync.get_items,
        lambda: session.sync.add_items([]),
        sync.pop_item,
        sync.clear_session,
    ):
        with pytest.raises(SessionClosed):
            call()
    if name == "redis":
        with pytest.raises(SessionClosed):
            await session._atomic_replace_items(said("a"))


@pytest.mark.parametrize("name", ["redis", "dapr"])
async def test_closing_leaves_a_given_client_and_its_session_usable(
    places: Places, name: str
) -> None:
    told = []
    for ours in (False, True):
        session = await places.given(name, ours, uuid.uuid4().hex)
        await session.add_items(said("a"))
        await session.close()
        told.append([await session.ping(), await session.get_items()])
    await places.aclose()
    assert told[1] == told[0] == [True, said("a")]


async def test_a_dapr_session_closes_at_the_end_of_its_block(places: Places) -> None:
    for ours in (False, True):
        async with places.owned("dapr", ours, "s") as session:
            assert await session.ping()
        assert await outcome(session.get_items()) is RuntimeError


def test_a_dapr_session_of_an_address_serves_who_has_no_loop(places: Places) -> None:
    session = places.owned("dapr", True, "s")
    session.sync.add_items(said("a"))
    assert session.sync.get_items() == said("a")


@pytest.mark.parametrize("ours", [True, False])
async def test_a_ping_of_what_is_down_is_false(places: Places, ours: bool) -> None:
    kind: Any = RedisSession if ours else SDKRedis
    session = kind.from_url("s", url="redis://127.0.0.1:1/0")
    assert await session.ping() is False


async def test_a_ping_of_a_sidecar_that_is_down_is_false(places: Places) -> None:
    client: Any = DaprClient(places.dapr.address)
    session = DaprSession("s", STORE, client)
    assert await session.ping()
    places.dapr.faults.unavailable = True
    assert await session.ping() is False
    await client.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"store_name": STORE},
        {"dapr_client": object()},
        {"store_name": STORE, "state_store_name": STORE, "dapr_client": object()},
    ],
)
def test_a_dapr_session_needs_one_store_and_a_client(arguments: Any) -> None:
    with pytest.raises(TypeError):
        DaprSession("s", **arguments)


async def test_a_conversation_takes_the_client_by_the_sdks_name() -> None:
    async with AsyncOpenAI(base_url="http://127.0.0.1:1", api_key="k") as client:
        for kind in (SDKConversations, OpenAIConversationsSession):
            build: Any = kind
            session = build(conversation_id="conv_1", openai_client=client)
            assert session.session_id == "conv_1"
        with pytest.raises(TypeError):
            OpenAIConversationsSession("conv_1", client, openai_client=client)


# -- what differs on purpose -----------------------------------------------------------


async def test_a_wrong_key_is_an_error_here_and_destroys_nothing() -> None:
    inner = SQLiteSession("s")
    await EncryptedSession(inner, KEY).add_items(said("a"))
    wrong = EncryptedSession(inner, OTHER)
    for call in (wrong.get_items, wrong.pop_item, wrong.clear_session):
        with pytest.raises(UnknownEncryptionKey):
            await call()
    assert await EncryptedSession(inner, KEY).get_items() == said("a")


async def test_there_is_no_ttl_unless_one_is_given() -> None:
    assert SDKEncrypted("s", SQLiteSession("s"), KEY).ttl == 600
    assert EncryptedSession("s", SQLiteSession("s"), KEY).ttl is None


def test_a_key_that_may_be_guessed_is_refused() -> None:
    SDKEncrypted("s", SQLiteSession("s"), "password")
    with pytest.raises(AgentSessionError):
        EncryptedSession("s", SQLiteSession("s"), "password")


@pytest.mark.parametrize("name", ["redis", "dapr", "encrypted"])
async def test_what_is_no_json_is_refused_here(places: Places, name: str) -> None:
    nan: Any = [{"role": "user", "content": float("nan")}]
    session = await places.given(name, False, "s")
    await session.add_items(nan)
    session = await places.given(name, True, uuid.uuid4().hex)
    with pytest.raises(InvalidItem):
        await session.add_items(nan)
    with pytest.raises(InvalidLimit):
        await session.get_items(-1)
    await places.aclose()


async def test_a_ttl_of_nothing_is_refused_here(places: Places) -> None:
    with pytest.raises(InvalidBackend, match="ttl"):
        await places.given("redis", True, "s", ttl=0)
    await places.aclose()
