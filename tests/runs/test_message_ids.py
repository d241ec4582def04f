"""A message has one id: in the stream, in snapshots, over HTTP and after a reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.core.management import call_command
from django.test import AsyncRequestFactory

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession
from agent_sessions.transfer.export import export_session
from agent_sessions.views import SessionMessagesView
from tests.runs.test_retries import failing_late
from tests.support.approvals import lookup, refund
from tests.support.chat import Socket
from tests.support.gated import gated
from tests.support.import_sources import run_import
from tests.support.list_backend import ListBackend
from tests.websocket.test_consumer import conversation, speaker

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


async def read_again(
    session_id: str, user: Any, agent: Any, backend: str = "default"
) -> list[list[Any]]:
    """Return the messages in a snapshot and over HTTP."""
    async with Socket(session_id, user, agent, backend=backend) as tab:
        await tab.sync()
        (event,) = [e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"]
    request = AsyncRequestFactory().get("/")
    request.user = user
    view: Any = sync_to_async(SessionMessagesView.as_view(backend=backend))
    answer = json.loads((await view(request, session_id=session_id)).content)
    return [event["messages"], answer["messages"]]


async def told(
    session_id: str, user: Any, agent: Any, backend: str = "default"
) -> list[list[str]]:
    """Return the ids in a snapshot and over HTTP."""
    return [
        [
            m["id"]
            for m in messages
            if m["role"] in {"user", "assistant"} and m.get("content")
        ]
        for messages in await read_again(session_id, user, agent, backend)
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


async def test_a_message_that_is_sent_again_has_the_id_that_it_is_stored_under() -> (
    None
):
    user, session_id = await conversation()
    agent = failing_late()
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Look it up")
            events = await tab.to_end()
    (snapshot,) = [e for e in events if e["type"] == "MESSAGES_SNAPSHOT"]
    roles = [message["role"] for message in snapshot["messages"]]
    assert roles == ["user", "assistant", "tool"]
    expected = [snapshot["messages"][0]["id"], *streamed(events)[1:]]
    assert await told(session_id, user, agent) == [expected, expected]


def agents_of(messages: list[Any]) -> list[str | None]:
    return [
        m.get("name") for m in messages if m["role"] == "assistant" and m.get("content")
    ]


def handing_over(item_id: str) -> Agent[Any]:
    billing: Agent[Any] = Agent(
        name="billing",
        model=ScriptedModel([[assistant_message("Same.", item_id=f"{item_id}b")]]),
    )
    steps: list[Any] = [
        [
            assistant_message("Same.", item_id=f"{item_id}a"),
            function_call("transfer_to_billing", {}, call_id="h"),
        ]
    ]
    return Agent(name="front", model=ScriptedModel(steps), handoffs=[billing])


@pytest.mark.parametrize("item_id", ["msg_", "msg_67ccd2bf17f0819081ff3bb2cf6508e"])
async def test_an_answer_names_its_agent_wherever_it_is_read(item_id: str) -> None:
    """A handoff changes the agent in the middle of a run, and of a page."""
    user, session_id = await conversation()
    agent = handing_over(item_id)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    live = [e["name"] for e in events if e["type"] == "TEXT_MESSAGE_START"]
    assert live == ["front", "billing"]
    for messages in await read_again(session_id, user, agent):
        assert agents_of(messages) == live


async def test_words_of_a_stopped_answer_name_their_agent() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        await tab.to_end()
    for messages in await read_again(session_id, user, agent):
        assert agents_of(messages) == ["speaker"]


async def test_a_snapshot_in_mid_run_names_the_agents_before_it() -> None:
    """At an approval the page is told all messages anew."""
    user, session_id = await conversation()
    steps: list[Any] = [
        [
            assistant_message("Shall I?"),
            function_call("refund", {"order": "1"}, call_id="c"),
        ]
    ]
    agent: Agent[Any] = Agent(name="a", model=ScriptedModel(steps), tools=[refund])
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        (snapshot,) = [
            e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"
        ]
    assert agents_of(snapshot["messages"]) == ["a"]


async def two_turns(session_id: str, user: Any) -> list[str]:
    ids: list[str] = []
    async with Socket(session_id, user, speaker("Same.", "Same.")) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            ids += streamed(await tab.to_end())
    return ids


async def test_a_branch_keeps_the_ids_of_the_turns_that_it_shares() -> None:
    user, session_id = await conversation()
    ids = await two_turns(session_id, user)
    session = DjangoSession(session_id, user=user)
    await session.create_branch_from_turn(2)
    assert await told(session_id, user, speaker()) == [ids[:2], ids[:2]]
    async with Socket(session_id, user, speaker("Other.")) as tab:
        await tab.say("r-3", "Hi again")
        ids[2:] = streamed(await tab.to_end())
    assert await told(session_id, user, speaker()) == [ids, ids]


@pytest.mark.one_database
async def test_an_export_and_its_import_keep_the_ids(tmp_path: Path) -> None:
    user, session_id = await conversation()
    ids = await two_turns(session_id, user)
    path = tmp_path / "sessions.jsonl"

    def leave_and_come_back() -> None:
        row = AgentSession.objects.get(session_id=session_id)
        path.write_text("".join(export_session(row)), encoding="utf-8")
        row.delete()
        run_import("export", path)

    await sync_to_async(leave_and_come_back)()
    assert await told(session_id, user, speaker()) == [ids, ids]
    for messages in await read_again(session_id, user, speaker()):
        assert agents_of(messages) == ["speaker"] * 2


@pytest.mark.one_database
@pytest.mark.parametrize("target", ["second", "lists"])
async def test_a_copy_keeps_the_ids(target: str, settings: Any) -> None:
    database = "agent_sessions.backends.database.DatabaseBackend"
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": database},
        "second": {"BACKEND": database},
        "lists": {"BACKEND": ListBackend},
    }
    ListBackend.histories.clear()
    user, session_id = await conversation()
    # Its positions are others than the copy's.
    session = DjangoSession(session_id, user=user)
    await session.add_items([{"role": "user", "content": "gone"}])
    await session.pop_item()
    ids = await two_turns(session_id, user)
    copied = sync_to_async(call_command)
    await copied("copy_agent_sessions", "--from", "default", "--to", target, "--all")
    assert await told(session_id, user, speaker(), backend=target) == [ids, ids]
    for messages in await read_again(session_id, user, speaker(), target):
        assert agents_of(messages) == ["speaker"] * 2
    # A store that tells no times of its items keeps them too.
    async with Socket(session_id, user, speaker("More."), backend=target) as tab:
        await tab.say("r-3", "Hi")
        ids += streamed(await tab.to_end())
    assert await told(session_id, user, speaker(), backend=target) == [ids, ids]
