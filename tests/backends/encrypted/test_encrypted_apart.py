"""Plain and encrypted aliases over one store share no session."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.checks import ERROR, run_checks
from django.test import override_settings
from openai import AsyncOpenAI

from agent_sessions import (
    EncryptedSession,
    OpenAIConversationsSession,
    RedisSession,
    get_session,
    sessions,
)
from agent_sessions.backends.wrapping import innermost
from agent_sessions.exceptions import InvalidBackend
from tests.backends.encrypted.test_encrypted_contract import DATABASE, ENCRYPTED, KEY
from tests.encryption.test_encryption import said
from tests.servers import Server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import url
from tests.support.chat import make_user

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


def over(inner: Any) -> Any:
    """Return settings of two encrypted aliases beside the plain one that they wrap."""
    options = {"backend": "default", "keys": [KEY]}
    sealed = {"BACKEND": ENCRYPTED, "OPTIONS": options}
    return override_settings(
        AGENT_SESSIONS={"default": inner, "private": sealed, "secret": sealed}
    )


@pytest.fixture(params=["redis", "valkey", "cluster", "dapr", "sdk", "orm"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return the settings of a store; only what is asked for is started."""
    redis = "agent_sessions.backends.redis.RedisBackend"
    match request.param:
        case "redis" | "valkey" as name:
            server: Server = request.getfixturevalue(f"{name}_server")
            return {"BACKEND": redis, "OPTIONS": {"url": url(server)}}
        case "cluster":
            server = request.getfixturevalue("redis_cluster")[0]
            options = {"url": url(server), "cluster": True}
            return {"BACKEND": redis, "OPTIONS": options}
        case "dapr":
            sidecar: DaprSidecar = request.getfixturevalue("dapr_server")
            assert sidecar is not None
            path = "agent_sessions.backends.dapr.DaprBackend"
            return {"BACKEND": path, "OPTIONS": {"store_name": STORE}}
        case "sdk":
            options = {
                "session": "agents.SQLiteSession",
                "db_path": str(tmp_path / "sessions.sqlite3"),
            }
            path = "agent_sessions.backends.sdk.SDKBackend"
            return {"BACKEND": path, "OPTIONS": options}
    return {"BACKEND": DATABASE}


ALIASES = ("default", "private", "secret")


@pytest.mark.parametrize("owned", [False, True], ids=["nobody", "alice"])
async def test_aliases_over_one_store_share_nothing(inner: Any, owned: bool) -> None:
    user = await sync_to_async(make_user)() if owned else None
    session_id = uuid.uuid4().hex
    with over(inner):
        opened = {a: get_session(session_id, user=user, backend=a) for a in ALIASES}
        for alias, session in opened.items():
            assert await session.get_items() == []
            await session.add_items([said(f"in {alias}"), said("last")])
        for alias, session in opened.items():
            texts = [i["content"] for i in await session.get_items()]  # type: ignore[typeddict-item]
            assert texts == [f"in {alias}", "last"]
        assert (await opened["private"].pop_item()) == said("last")
        await opened["secret"].clear_session()
        await opened["secret"].add_items([said("anew")])
        assert await opened["private"].get_items() == [said("in private")]
        assert await opened["secret"].get_items() == [said("anew")]
        assert len(await opened["default"].get_items()) == 2
        await opened["default"].clear_session()
        assert await opened["private"].get_items() == [said("in private")]
        await sync_to_async(sessions.reset)()


@pytest.mark.parametrize(
    "session_id", ["a", "a:messages", "private:a", "-in:private:a"]
)
async def test_no_id_reaches_what_another_alias_encrypted(
    redis_server: Server, session_id: str
) -> None:
    options: Any = {"url": url(redis_server), "key_prefix": uuid.uuid4().hex}
    path = "agent_sessions.backends.redis.RedisBackend"
    with over({"BACKEND": path, "OPTIONS": options}):
        await get_session("a", backend="private").add_items([said("hidden")])
        plain = get_session(session_id)
        alone = RedisSession.from_url(session_id, **options)
        assert await plain.get_items() == await alone.get_items() == []
        # A plain session of that name is everybody's who opens it so, as ever.
        await alone.add_items([said("plain")])
        assert await plain.get_items() == [said("plain")]
        listed = {}
        for alias in ALIASES:
            store: Any = innermost(sessions[alias])
            listed[alias] = await sync_to_async(lambda s=store: list(s.list_ids()))()
        assert listed == {"default": [session_id], "private": ["a"], "secret": []}
        assert await get_session("a", backend="private").get_items() == [said("hidden")]


def test_a_store_that_takes_only_items_that_it_knows_is_refused() -> None:
    path = "agent_sessions.backends.openai.OpenAIConversationsBackend"
    with over({"BACKEND": path, "OPTIONS": {"api_key": "sk-1"}}):
        errors = [message.id for message in run_checks() if message.level >= ERROR]
        assert errors == ["agent_sessions.E013"] * 2
        for _ in range(2):
            with pytest.raises(InvalidBackend, match="can't encrypt what"):
                get_session("a", backend="private").sync.get_items()
    conversation = OpenAIConversationsSession("conv_1", AsyncOpenAI(api_key="sk-1"))
    with pytest.raises(TypeError, match="take no items that are encrypted"):
        EncryptedSession(conversation, "a text of 32 characters or more 1")
