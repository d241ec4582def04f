"""A reader that lags goes on from its number: one run, one RUN_STARTED."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache

from agent_sessions.consumers import AgentConsumer
from tests.support.approvals import lookup
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)

CALLS = 120


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


class Slow(AgentConsumer):
    """Takes its time for each frame, as a bad connection does."""

    async def send(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0.01)
        await super().send(*args, **kwargs)


def bursting() -> Agent[Any]:
    calls = [
        function_call("lookup", {"order": str(n)}, call_id=f"call_{n}")
        for n in range(CALLS)
    ]
    model = ScriptedModel([calls, [assistant_message("done")]])
    return Agent(name="a", model=model, tools=[lookup])


async def test_a_burst_of_calls_reaches_its_reader_whole() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, bursting(), consumer=Slow) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end(within=20)
    kinds = [event["type"] for event in events]
    assert kinds.count("RUN_STARTED") == 1
    assert kinds.count("TOOL_CALL_START") == kinds.count("TOOL_CALL_RESULT") == CALLS
    assert text_of(events) == "done"
    ids = [frame["id"] for frame in tab.frames]
    assert ids == [f"r-1:{number}" for number in range(1, len(ids) + 1)]


async def test_a_run_is_followed_by_the_next_from_a_known_number() -> None:
    user, session_id = await conversation()
    texts = ("one", "two")
    model = ScriptedModel([[assistant_message(text)] for text in texts])
    speaker = Agent(name="a", model=model)
    async with Socket(session_id, user, speaker) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            await tab.to_end()
        known = [f["id"] for f in tab.frames if f["id"].startswith("r-2")]
        await tab.sync(known[2])
        output = await tab.communicator.receive_output(20)
    assert json.loads(output["text"])["id"] == known[3]


async def test_a_run_that_is_sent_again_where_it_is_told_goes_on() -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello you", pause_at=1)
    async with Socket(session_id, user, speaker) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        assert (await tab.frame())["chunk"]["type"] == "RUN_STARTED"
        await tab.say("r-1", "Hi")
        # Answered after the repeat: frames are read in their order.
        await tab.send({"type": "abort", "runId": "other"})
        await asyncio.sleep(0.2)
        model.gate.set()
        events = await tab.to_end()
    assert text_of(events) == "Hello you"
    assert "RUN_STARTED" not in [event["type"] for event in events]


async def test_an_old_run_that_is_sent_again_waits_for_the_open_one() -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello you", pause_at=1)
    model.gate.set()
    async with Socket(session_id, user, speaker) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        model.gate.clear()
        model.paused.clear()
        await tab.say("r-2", "Again")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_START")
        await tab.say("r-1", "Hi")
        # Answered after the repeat: frames are read in their order.
        await tab.send({"type": "abort", "runId": "?", "mode": "never"})
        assert (await tab.until("RUN_ERROR"))[-1]["code"] == "bad_request"
        model.gate.set()
        events = await tab.to_end()
        assert "RUN_STARTED" not in [event["type"] for event in events]
        # The history tells what it said, as its log is gone.
        kinds = [event["type"] for event in await tab.to_end()]
        assert kinds == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]


class Slower(AgentConsumer):
    """Takes longer for a snapshot than between two looks at other processes."""

    async def send(self, *args: Any, **kwargs: Any) -> None:
        await super().send(*args, **kwargs)
        if "MESSAGES_SNAPSHOT" in kwargs["text_data"]:
            await asyncio.sleep(0.3)


async def test_a_slow_client_hears_the_end_of_what_it_is_told() -> None:
    user, session_id = await conversation()
    speaker, _ = gated("Hello")
    options: dict[str, Any] = {"consumer": Slower, "recheck_interval": 0.1}
    async with Socket(session_id, user, speaker, **options) as tab:
        await tab.sync()
        events = await tab.to_end()
    kinds = [event["type"] for event in events]
    assert kinds == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]
