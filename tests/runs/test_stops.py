"""Stopped answers and blocked ones: what is kept, what is taken back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    ModelBehaviorError,
    Runner,
    ToolGuardrailFunctionOutput,
    function_tool,
    input_guardrail,
    output_guardrail,
    tool_input_guardrail,
    tool_output_guardrail,
)
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from django.core.cache import cache

from agent_sessions import get_session
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.exceptions import InvalidConsumer, StorageError
from agent_sessions.items.kinds import ended_early
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, get_run_manager, records
from agent_sessions.transcript import parse
from tests.runs.test_runs import approve, cashier
from tests.support.approvals import refund
from tests.support.chat import Socket
from tests.support.gated import GatedModel, gated
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


@pytest.mark.parametrize("model_ids", [True, False])
async def test_the_same_words_twice_in_a_turn_are_kept_twice(model_ids: bool) -> None:
    running, quick = asyncio.Event(), 1

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
            assistant_message("Let me look.", item_id=f"msg_{n if model_ids else 0}"),
            function_call("slow", {}, call_id=f"c{n}"),
        ]
        for n in range(2)
    ]
    agent: Agent[Any] = Agent(name="a", model=ScriptedModel(turns), tools=[slow])
    user, session_id = await conversation()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await running.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        await tab.to_end()
    texts = [text for kind, role, text in await items_of(session_id) if text]
    assert texts == ["Hi", "Let me look.", "Let me look."]


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


@pytest.mark.parametrize("action", ["redact", "remove"])
async def test_a_block_after_approvals_takes_what_the_run_was_asked(
    action: Any,
) -> None:
    """An unanswered message stands before it; the run pauses twice."""
    steps: list[Any] = [
        ModelStep.raise_error(RuntimeError("away")),
        [function_call("refund", {"order": "1"}, call_id="call_1")],
        [function_call("refund", {"order": "2"}, call_id="call_2")],
        [assistant_message("a secret")],
    ]
    agent: Agent[Any] = Agent(
        name="a",
        model=ScriptedModel(steps),
        tools=[refund],
        output_guardrails=[refuse_answer],
    )
    user, session_id = await conversation()
    async with Socket(session_id, user, agent, blocked_messages=action) as tab:
        await tab.say("r-1", "First")
        await tab.to_end()
        await tab.say("r-2", "Second")
        await tab.to_end()
        for number in (1, 2):
            await tab.answer(f"a-{number}", approve(f"call_{number}"))
            events = await tab.to_end()
        assert events[-1]["code"] == "guardrail"
    items = [(kind, text) for kind, _, text in await items_of(session_id)]
    texts = [text for kind, text in items if kind == "message"]
    # What was done is told below a note, whatever is wished.
    assert texts == ["First", "[blocked]"]
    assert len(items) == 6


def test_an_unknown_wish_for_blocked_messages_is_refused() -> None:
    with pytest.raises(InvalidConsumer, match="blocked_messages"):
        Socket("s", None, speaker(), blocked_messages="hide")


class Failing(GatedModel):
    """Breaks off where a gated model waits."""

    def __init__(self, text: str, exc: Exception | None = None) -> None:
        super().__init__(text)
        self.exc: Exception | None = exc or RuntimeError("the model broke off")

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for event in super().stream_response(*args, **kwargs):
            yield event
            if self.exc is not None and self.paused.is_set():
                raise self.exc


def breaking(exc: Exception | None = None) -> tuple[Agent[Any], Failing]:
    model = Failing("one two three", exc)
    model.gate.set()
    return Agent(name="speaker", model=model), model


async def assert_words_are_kept(tab: Socket, session_id: str, user: Any) -> None:
    texts = [text for *_, text in await items_of(session_id)]
    assert texts[0] == "Hi"
    assert texts[1].startswith("one two")
    messages = await snapshot_of(tab)
    assert messages[-1]["metadata"] == {"stopped": True}
    assert ended_early((await stored(session_id, user))[-1])


async def test_words_before_an_error_are_kept() -> None:
    user, session_id = await conversation()
    agent, _ = breaking()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["code"] == "internal"
        await assert_words_are_kept(tab, session_id, user)


async def test_words_before_an_error_of_the_model_are_kept() -> None:
    user, session_id = await conversation()
    agent, _ = breaking(ModelBehaviorError("broken"))
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["code"] == "model_error"
        await assert_words_are_kept(tab, session_id, user)


async def test_words_before_a_time_out_are_kept() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    limits = RunLimits(run_timeout=0.5)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        assert (await tab.to_end())[-1]["code"] == "timeout"
        await assert_words_are_kept(tab, session_id, user)


async def test_words_before_a_shutdown_are_kept() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent, limits=RunLimits(grace=0)) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await get_run_manager().shutdown()
        assert (await tab.to_end())[-1]["code"] == "interrupted"
    assert ended_early((await stored(session_id, user))[-1])


async def test_a_run_that_begins_during_a_shutdown_gives_its_lease_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user, session_id = await conversation()
    agent, _ = gated("one two three")
    begun, goes_on, begin = threading.Event(), threading.Event(), records.begin

    def slow(*args: Any, **options: Any) -> Any:
        lease = begin(*args, **options)
        begun.set()
        goes_on.wait(30)
        return lease

    # Only later than it would be: the row is written, but nobody has heard of it yet.
    monkeypatch.setattr(records, "begin", slow)
    async with Socket(session_id, user, agent, limits=RunLimits(grace=0)) as tab:
        await tab.say("r-1", "Hi")
        while not begun.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        shutdown = asyncio.create_task(get_run_manager().shutdown())
        await asyncio.sleep(0.1)
        goes_on.set()
        await shutdown
    row = await AgentSession.objects.aget(session_id=session_id)
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (row.run_id, run.status) == ("", "interrupted")


async def test_unchecked_words_are_not_kept_after_an_error() -> None:
    user, session_id = await conversation()
    agent, _ = breaking()
    agent.output_guardrails.append(refuse_answer)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert [text for *_, text in await items_of(session_id)] == ["Hi"]


async def test_a_retry_answers_anew_where_words_were_kept() -> None:
    user, session_id = await conversation()
    agent, model = breaking()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        model.exc = None
        await tab.say("r-2", "Hi")
        events = await tab.to_end()
    (snapshot,) = [e for e in events if e["type"] == "MESSAGES_SNAPSHOT"]
    assert [m["content"] for m in snapshot["messages"]] == ["Hi"]
    assert events[-1]["outcome"] == {"type": "success"}
    texts = [text for *_, text in await items_of(session_id)]
    assert texts == ["Hi", "one two three"]


# -- each kind of guardrail --------------------------------------------------------------


@tool_input_guardrail
def refuse_call(data: Any) -> Any:
    return ToolGuardrailFunctionOutput.raise_exception()


@tool_output_guardrail
def refuse_output(data: Any) -> Any:
    return ToolGuardrailFunctionOutput.raise_exception()


def caller(**guards: Any) -> Agent[Any]:
    async def act() -> str:
        return "done"

    steps: list[Any] = [
        [function_call("act", {}, call_id="c")],
        [assistant_message("a secret")],
    ]
    return Agent(
        name="a", model=ScriptedModel(steps), tools=[function_tool(act, **guards)]
    )


def of_kind(kind: str) -> Agent[Any]:
    if kind == "tool input":
        return caller(tool_input_guardrails=[refuse_call])
    if kind == "tool output":
        return caller(tool_output_guardrails=[refuse_output])
    agent = speaker("a secret")
    agent.output_guardrails.append(refuse_answer)
    return agent


@pytest.mark.parametrize("kind", ["output", "tool input", "tool output"])
@pytest.mark.parametrize(
    ("action", "left"), [("keep", ["Hi"]), ("redact", ["[blocked]"]), ("remove", [])]
)
async def test_every_guardrail_blocks_the_turn(
    kind: str, action: Any, left: list[str]
) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, of_kind(kind), blocked_messages=action) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "guardrail"
    assert [m["content"] for m in events[-2]["messages"]] == left
    assert [text for *_, text in await items_of(session_id)] == left


@pytest.mark.parametrize("action", ["redact", "remove"])
async def test_what_a_tool_has_done_stays_in_a_blocked_turn(action: Any) -> None:
    user, session_id = await conversation()
    agent = caller()
    agent.output_guardrails.append(refuse_answer)
    async with Socket(session_id, user, agent, blocked_messages=action) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert [(kind, text) for kind, _, text in await items_of(session_id)] == [
        ("message", "[blocked]"),
        ("function_call", ""),
        ("function_call_output", ""),
    ]


async def test_nothing_is_forgotten_where_a_block_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a tool has done is taken out and put back: a kill between must lose nothing."""
    user, session_id = await conversation()
    agent = caller()
    agent.output_guardrails.append(refuse_answer)

    def check(items: Any) -> None:
        if items[0].get("content") == "[blocked]":
            raise StorageError("killed")

    def fail(store: Any, key: Any, items: Any) -> None:
        check(items)
        append(store, key, items)

    async def afail(store: Any, key: Any, items: Any) -> None:
        check(items)
        await aappend(store, key, items)

    append, aappend = DatabaseBackend.append, DatabaseBackend.aappend
    monkeypatch.setattr(DatabaseBackend, "append", fail)
    monkeypatch.setattr(DatabaseBackend, "aappend", afail)
    async with Socket(session_id, user, agent, blocked_messages="redact") as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["code"] == "guardrail"
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output"]


async def test_a_guardrail_beside_the_run_blocks_what_is_stored_by_then() -> None:
    """It runs in parallel: a tool has been called when it trips."""
    called = asyncio.Event()

    async def act() -> str:
        called.set()
        return "done"

    @input_guardrail
    async def late(*args: Any) -> GuardrailFunctionOutput:
        await called.wait()
        return GuardrailFunctionOutput(None, tripwire_triggered=True)

    call = [function_call("act", {}, call_id="c")]
    agent: Agent[Any] = Agent(
        name="a",
        model=ScriptedModel([call, [assistant_message("a secret")]]),
        tools=[function_tool(act)],
        input_guardrails=[late],
    )
    user, session_id = await conversation()
    async with Socket(session_id, user, agent, blocked_messages="redact") as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "guardrail"
    items = [(kind, text) for kind, _, text in await items_of(session_id)]
    assert items[0] == ("message", "[blocked]")
    # What the SDK has stored of the turn by then is a call with its output, or nothing.
    kinds = [kind for kind, _ in items[1:]]
    assert kinds in ([], ["function_call", "function_call_output"])


async def test_a_guardrail_after_an_approval_blocks_the_turn() -> None:
    user, session_id = await conversation()
    agent = cashier()
    agent.output_guardrails.append(refuse_answer)
    async with Socket(session_id, user, agent, blocked_messages="redact") as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-2", approve())
        assert (await tab.to_end())[-1]["code"] == "guardrail"
    texts = [text for kind, _, text in await items_of(session_id) if kind == "message"]
    assert texts == ["[blocked]"]
