"""Stopped answers and blocked ones: what is kept, what is taken back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    Runner,
    function_tool,
    input_guardrail,
    output_guardrail,
)
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache

from agent_sessions import get_session
from agent_sessions.exceptions import InvalidConsumer
from agent_sessions.transcript import parse
from tests.support.chat import Socket
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, items_of, speaker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


@output_guardrail
async def refuse_answer(*args: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(None, tripwire_triggered=True)


@input_guardrail(run_in_parallel=False)
async def refuse_badness(context: Any, agent: Any, said: Any) -> Any:
    bad = "bad" in str(said[-1]["content"] if isinstance(said, list) else said)
    return GuardrailFunctionOutput(None, tripwire_triggered=bad)


async def stored(session_id: str, user: Any) -> list[Any]:
    return list(await get_session(session_id, user=user).get_items())


async def snapshot_of(tab: Socket) -> list[Any]:
    await tab.sync()
    (event,) = [e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"]
    messages: list[Any] = event["messages"]
    return messages


@pytest.mark.parametrize("calls_before", [0, 1])
async def test_words_before_a_tool_are_kept_by_a_stop(calls_before: int) -> None:
    running, quick = asyncio.Event(), calls_before

    @function_tool
    async def slow() -> str:
        nonlocal quick
        quick -= 1
        if quick < 0:
            running.set()
            await asyncio.sleep(60)
        return "found"

    turns: list[Any] = [
        [
            assistant_message(f"Let me look {n}."),
            function_call("slow", {}, call_id=f"c{n}"),
        ]
        for n in range(calls_before + 1)
    ]
    model = ScriptedModel([*turns, [assistant_message("done")]])
    agent: Agent[Any] = Agent(name="a", model=model, tools=[slow])
    user, session_id = await conversation()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await running.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        await tab.to_end()
        messages = await snapshot_of(tab)
    texts = [text for kind, role, text in await items_of(session_id) if text]
    expected = [f"Let me look {n}." for n in range(calls_before + 1)]
    assert [text for text in texts if text.startswith("Let")] == expected
    assert messages[-1]["content"] == expected[-1]
    assert messages[-1]["metadata"] == {"stopped": True}
    kept = (await stored(session_id, user))[-1]
    assert parse(kept).status == "stopped"
    # No model sees the mark, be the history read by the SDK or given to it.
    session: Any = get_session(session_id, user=user)
    await Runner.run(agent, "Go on", session=session)
    assert "agent_sessions" not in str(model.calls[-1].input)
    asked: Any = [kept, {"role": "user", "content": "Go on"}]
    other = ScriptedModel([[assistant_message("done")]])
    await Runner.run(Agent(name="b", model=other), asked)
    assert "agent_sessions" not in str(other.calls[-1].input)


async def test_unchecked_words_are_not_kept() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    agent.output_guardrails.append(refuse_answer)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        assert (await tab.to_end())[-1]["outcome"] == {"type": "cancelled"}
    assert [text for *_, text in await items_of(session_id)] == ["Hi"]


async def test_an_answer_that_is_refused_is_taken_back() -> None:
    user, session_id = await conversation()
    agent = speaker("a secret")
    agent.output_guardrails.append(refuse_answer)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert [event["type"] for event in events[-2:]] == [
        "MESSAGES_SNAPSHOT",
        "RUN_ERROR",
    ]
    assert [m["content"] for m in events[-2]["messages"]] == ["Hi"]
    assert events[-1]["code"] == "guardrail"


@pytest.mark.parametrize(
    ("action", "left"),
    [
        ("keep", ["ok", "yes", "bad"]),
        ("redact", ["ok", "yes", "[blocked]"]),
        ("remove", ["ok", "yes"]),
    ],
)
async def test_what_becomes_of_a_blocked_message(action: Any, left: list[str]) -> None:
    user, session_id = await conversation()
    agent = speaker("yes", "again")
    agent.input_guardrails.append(refuse_badness)
    async with Socket(session_id, user, agent, blocked_messages=action) as tab:
        await tab.say("r-1", "ok")
        await tab.to_end()
        await tab.say("r-2", "bad")
        events = await tab.to_end()
        assert events[-1]["code"] == "guardrail"
        assert [m["content"] for m in events[-2]["messages"]] == left
        await tab.say("r-3", "fine")
        await tab.to_end()
    texts = [text for *_, text in await items_of(session_id)]
    assert texts == [*left, "fine", "again"]


def test_an_unknown_wish_for_blocked_messages_is_refused() -> None:
    with pytest.raises(InvalidConsumer, match="blocked_messages"):
        Socket("s", None, speaker(), blocked_messages="hide")
