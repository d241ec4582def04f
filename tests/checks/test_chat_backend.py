"""AGENT_SESSIONS_CHAT_BACKEND: one alias for the websocket and its HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.test import AsyncClient

from agent_sessions import checks
from agent_sessions.consumers import AgentConsumer
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession
from agent_sessions.views import SessionListView
from tests.support.chat import Socket, make_user, text_of

AGENT: Agent[Any] = Agent(
    name="Support", model=ScriptedModel([[assistant_message("Hello")]])
)


@pytest.fixture(autouse=True)
def _chats_elsewhere(settings: Any) -> None:
    cache.clear()
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "chats": {"BACKEND": DATABASE_BACKEND},
    }
    settings.AGENT_SESSIONS_CHAT_BACKEND = "chats"


@pytest.mark.django_db(transaction=True)
async def test_the_socket_and_the_views_use_the_alias_of_the_setting() -> None:
    user = await sync_to_async(make_user)()
    client = AsyncClient()
    await client.aforce_login(user)
    session_id = (await client.post("/agents/sessions/")).json()["id"]
    async with Socket(session_id, user, AGENT) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "Hello"
    row = await AgentSession.objects.aget()
    assert (row.backend, row.item_count) == ("chats", 2)
    listed = (await client.get("/agents/sessions/")).json()["sessions"]
    assert [each["id"] for each in listed] == [session_id]
    path = f"/agents/sessions/{session_id}/"
    messages = (await client.get(f"{path}messages/")).json()["messages"]
    assert [each["content"] for each in messages] == ["Hi", "Hello"]
    assert (await client.delete(path)).status_code == 204
    assert not await AgentSession.objects.aexists()


@pytest.mark.django_db(transaction=True)
async def test_an_alias_of_its_own_wins() -> None:
    user = await sync_to_async(make_user)()
    client = AsyncClient()
    await client.aforce_login(user)
    session_id = (await client.post("/agents/sessions/")).json()["id"]
    async with Socket(session_id, user, AGENT, backend="default") as tab:
        assert await tab.closed() == 4404


def test_an_alias_that_is_not_there_is_told(settings: Any) -> None:
    assert checks.check_backends() == []
    settings.AGENT_SESSIONS_CHAT_BACKEND = "chat"
    [error] = checks.check_backends()
    assert error.id == "agent_sessions.E002"
    assert "AGENT_SESSIONS_CHAT_BACKEND is 'chat'" in error.msg
    assert "'chats'" in str(error.hint)
    with pytest.raises(InvalidBackend, match="no alias 'chat'"):
        AgentConsumer.as_asgi(agent=AGENT)


def test_what_is_no_alias_is_told(settings: Any) -> None:
    settings.AGENT_SESSIONS_CHAT_BACKEND = ["chats"]
    [error] = checks.check_backends()
    assert error.id == "agent_sessions.E002"


def test_without_the_setting_it_is_the_default(settings: Any) -> None:
    del settings.AGENT_SESSIONS_CHAT_BACKEND
    assert AgentConsumer.backend == SessionListView.backend == "default"
