"""A message has one id: in the stream, in snapshots, over HTTP and after a reload."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache
from django.test import AsyncClient
from django.urls import reverse

from tests.support.approvals import lookup
from tests.support.chat import Socket
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def streamed(events: list[Any]) -> list[str]:
    ids = []
    for event in events:
        if event["type"] == "RUN_STARTED":
            ids += [message["id"] for message in event["input"]["messages"]]
        elif event["type"] == "TEXT_MESSAGE_START":
            ids.append(event["messageId"])
    return ids


async def told(session_id: str, user: Any, agent: Any) -> list[list[str]]:
    """Return the ids in a snapshot and over HTTP."""
    async with Socket(session_id, user, agent) as tab:
        await tab.sync()
        (event,) = [e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"]
    client = AsyncClient()
    await client.aforce_login(user)
    url = reverse("agent_sessions:messages", args=[session_id])
    answer = (await client.get(url)).json()
    return [
        [
            m["id"]
            for m in messages
            if m["role"] in {"user", "assistant"} and m.get("content")
        ]
        for messages in (event["messages"], answer["messages"])
    ]


async def test_ids_are_the_same_everywhere() -> None:
    user, session_id = await conversation()
    steps: list[Any] = [
        [
            assistant_message("Let me look."),
            function_call("lookup", {"order": "1"}, call_id="c"),
        ],
        [assistant_message("Found.")],
        [assistant_message("Found.")],
    ]
    agent: Agent[Any] = Agent(name="a", model=ScriptedModel(steps), tools=[lookup])
    ids: list[str] = []
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            ids += streamed(await tab.to_end())
    assert len(ids) == len(set(ids)) == 5
    assert ids[0] == "u-r-1"
    assert await told(session_id, user, agent) == [ids, ids]


async def test_words_that_a_stop_has_kept_have_their_id() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        ids = streamed(await tab.to_end())
    assert len(ids) == 2
    assert await told(session_id, user, agent) == [ids, ids]
