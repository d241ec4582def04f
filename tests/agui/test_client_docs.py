"""docs/client.md: its frames, held against those of real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Usage
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache

from agent_sessions import agui
from agent_sessions.agui import RunRequest, StreamOptions, parse_frame
from agent_sessions.agui.frames import MAX_RUN_ID
from agent_sessions.models import AgentSession
from agent_sessions.runs import RunLimits
from tests.support.approvals import lookup, refund
from tests.support.chat import Socket, create_conversation, make_user
from tests.support.documents import blocks, page
from tests.support.gated import gated

CLIENT = page("docs/client.md")
FRAMES = [
    json.loads(line)
    for block in blocks(CLIENT.replace("\n  ", "\n"), "json")
    for line in block.splitlines()
    if line.strip()
]
# What is another at each run, and what the page says in its place.
RANDOM = {
    r"\bsync:[0-9a-f]{12}": "sync:657879b00402",
    r"\brefused:[0-9a-f]{12}": "refused:1e169ea4cb99",
    r"\b[0-9a-f]{16}:0\b": "6f0c2ad19b3e4875:0",
    r'"expiresAt": "[^"]*"': '"expiresAt": "2026-12-01T09:30:00+00:00"',
}


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    cache.clear()


def told(tab: Socket) -> list[dict[str, Any]]:
    """Return the frames that a tab got, with the page's ids in them."""
    text = json.dumps(tab.frames).replace(tab.session_id, "9f1c")
    for pattern, name in RANDOM.items():
        text = re.sub(pattern, name, text)
    frames: list[dict[str, Any]] = json.loads(text)
    return frames


def agent() -> Agent[Any]:
    """Return an agent that calls one tool that runs and two that ask."""
    used = Usage(requests=1, input_tokens=60, output_tokens=4, total_tokens=64)
    more = Usage(requests=1, input_tokens=60, output_tokens=5, total_tokens=65)
    steps: list[Any] = [
        ModelStep(
            output=[function_call("lookup", {"order": "41"}, call_id="call_1")],
            usage=used,
        ),
        ModelStep(output=[assistant_message("It is on its way.")], usage=more),
        [function_call("refund", {"order": "42"}, call_id="call_2")],
    ]
    return Agent(name="Support", tools=[lookup, refund], model=ScriptedModel(steps))


async def frames_of(options: StreamOptions) -> list[dict[str, Any]]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    limits = RunLimits(must_answer=True)
    more: dict[str, Any] = {"stream_options": options, "limits": limits}
    async with Socket(row.session_id, user, agent(), **more) as tab:
        await tab.sync()
        await tab.to_end()
        await tab.say("r-1", "Where is order 41?")
        await tab.to_end()
        await tab.say("r-4", "Refund order 42")
        await tab.to_end()
        await tab.say("r-6", "Hello?")
        await tab.to_end()
        return told(tab)


@pytest.mark.django_db(transaction=True)
async def test_the_frames_are_those_of_real_runs() -> None:
    real = [
        *await frames_of(StreamOptions(expose_tools="full")),
        *await frames_of(StreamOptions()),
    ]
    wanted = [frame for frame in FRAMES if "chunk" in frame and not _stopped(frame)]
    assert len(wanted) == 17
    missing = [json.dumps(frame) for frame in wanted if frame not in real]
    assert missing == []
    whole = [frame for frame in wanted if frame["id"].startswith("r-1:")]
    full = [frame for frame in real if frame["id"].startswith("r-1:")]
    assert whole[:11] == full[:11]


def _stopped(frame: dict[str, Any]) -> bool:
    outcome = frame.get("chunk", {}).get("outcome", {})
    return bool(outcome.get("type") == "cancelled")


@pytest.mark.django_db(transaction=True)
async def test_a_stopped_run_ends_as_the_page_says() -> None:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    speaker, model = gated("Once upon a time")
    async with Socket(row.session_id, user, speaker) as tab:
        await tab.say("r-3", "Tell me a story")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-3"})
        await tab.to_end()
        [real] = [frame for frame in told(tab) if _stopped(frame)]
    [wanted] = [frame for frame in FRAMES if _stopped(frame)]
    assert real["chunk"] == wanted["chunk"]


@pytest.mark.django_db(transaction=True)
async def test_branches_are_asked_for_as_the_page_says() -> None:
    """And the message has its place as the page says."""
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    asked = [frame for frame in FRAMES if "forwardedProps" in frame]
    [message] = [frame for frame in FRAMES if "role" in frame]
    texts = [[assistant_message("Here.")] for _ in range(3)]
    speaker: Agent[Any] = Agent(name="a", model=ScriptedModel(texts))
    async with Socket(row.session_id, user, speaker) as tab:
        await tab.say("r-1", "Where is order 41?")
        await tab.to_end()
        ends = []
        for frame in asked:
            await tab.send({**frame, "threadId": row.session_id})
            ends.append(await tab.to_end())
        assert [events[-1]["outcome"]["type"] for events in ends] == ["success"] * 3
        assert ends[0][1]["messages"] == [message]
        assert ends[2][1]["metadata"]["branch"] == "main"


def test_the_answer_is_a_frame() -> None:
    [answer] = [frame for frame in FRAMES if "resume" in frame]
    read = parse_frame(json.dumps(answer))
    assert isinstance(read, RunRequest)
    assert read.resume


def _events() -> Iterator[tuple[str, set[str]]]:
    table = CLIENT.split("| event |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, fields = line.split("|")[1:3]
        yield name.strip(" `"), set(re.findall(r"`(\w+)`", fields))


def test_the_table_has_every_event() -> None:
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(agui.__file__).parent.glob("*.py")
    )
    types = set(re.findall(r'"type": "([A-Z_]+)"', source))
    assert {name for name, _fields in _events()} == types
    fields = dict(_events())
    for frame in FRAMES:
        if event := frame.get("chunk"):
            optional = {"type", "metadata", "usage"}
            assert event.keys() - optional == fields[event["type"]], event


def test_the_page_knows_the_states_and_lengths() -> None:
    assert f"up to {MAX_RUN_ID} characters" in CLIENT
    text = " ".join(CLIENT.split())
    assert "`state` is `idle`, `running`, or `waiting`" in text
    assert set(AgentSession.State.values) == {"idle", "running", "waiting"}
