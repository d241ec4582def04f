"""Runs started with the SDK's own Runner, recorded by SessionHooks."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    MaxTurnsExceeded,
    OutputGuardrailTripwireTriggered,
    Runner,
    RunState,
    output_guardrail,
)
from agents.testing import ScriptedModel
from django.contrib.auth import get_user_model

from agent_sessions import DjangoSession, SessionHooks
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.testing.base import RUNS, Run
from tests.support.approvals import lookup, refund
from tests.support.usages import agent, call, say, standing, used

pytestmark = pytest.mark.django_db(transaction=True)

each = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


async def rows() -> list[AgentRun]:
    return [row async for row in AgentRun.objects.order_by("pk")]


async def tokens() -> int:
    row = await AgentSession.objects.aget()
    count: int = row.input_tokens
    return count


@each
async def test_a_run_has_one_row(run: Run) -> None:
    session = DjangoSession("s")
    speaker = agent(
        call("lookup", order="1"), say("ok", used(50, cached=3)), tools=[lookup]
    )
    async with SessionHooks(session) as hooks:
        await run(speaker, "Hi", session=session, hooks=hooks)
    (row,) = await rows()
    assert (row.status, row.agent_name, row.model) == (
        "completed",
        "speaker",
        "ScriptedModel",
    )
    assert (row.requests, row.input_tokens, row.cached_tokens) == (2, 57, 3)
    assert (row.first_position, row.last_position, row.turn) == (1, 4, 1)
    assert row.finished_at is not None
    assert row.sdk_version
    stored = await AgentSession.objects.aget()
    assert (stored.input_tokens, stored.requests, stored.agent_name) == (
        57,
        2,
        "speaker",
    )
    usage = await session.get_session_usage()
    assert usage is not None
    assert (usage["input_tokens"], usage["total_turns"]) == (57, 1)


@each
async def test_hooks_alone_record_too(run: Run) -> None:
    """Without the block nothing is known of the answer's own items, only of the run."""
    session = DjangoSession("s")
    hooks = SessionHooks(session)
    for text in ("one", "two"):
        result = await run(agent(say("ok")), text, session=session, hooks=hooks)
    first, second = await rows()
    assert (first.status, first.turn, first.first_position) == ("completed", 1, 1)
    assert (second.status, second.turn, second.first_position) == ("completed", 2, 3)
    assert await tokens() == 14
    turns: Any = await session.get_turn_usage()
    assert [turn["requests"] for turn in turns] == [1, 1]
    # It is the run that has a row already.
    await session.store_run_usage(result)
    assert len(await rows()) == 2
    assert await tokens() == 14


@each
async def test_the_agent_after_a_handoff(run: Run) -> None:
    session = DjangoSession("s")
    expert = agent(say("ok"), name="expert")
    desk = agent(call("transfer_to_expert"), name="desk", handoffs=[expert])
    async with SessionHooks(session) as hooks:
        await run(desk, "Hi", session=session, hooks=hooks)
    (row,) = await rows()
    assert (row.agent_name, row.requests) == ("expert", 2)
    assert (await AgentSession.objects.aget()).agent_name == "expert"


# -- runs that break off ---------------------------------------------------------------


@each
async def test_a_failed_run_keeps_what_it_used(run: Run) -> None:
    session = DjangoSession("s")
    speaker = agent(
        *[call("lookup", f"c{n}", order="1") for n in range(3)], tools=[lookup]
    )
    with pytest.raises(MaxTurnsExceeded):
        async with SessionHooks(session) as hooks:
            await run(speaker, "Hi", session=session, hooks=hooks, max_turns=2)
    (row,) = await rows()
    assert (row.status, row.error_code, row.requests) == ("failed", "max_turns", 2)
    assert (row.first_position, row.last_position) == (1, 5)
    assert await tokens() == 14
    turn = await session.get_turn_usage(1)
    assert isinstance(turn, dict)
    assert turn["requests"] == 2


@each
async def test_a_cancelled_run_keeps_what_it_used(run: Run) -> None:
    """openai-agents #1895."""
    session = DjangoSession("s")
    tool, called = standing()
    speaker = agent(call("stand_still"), tools=[tool])

    async def go() -> None:
        async with SessionHooks(session) as hooks:
            await run(speaker, "Hi", session=session, hooks=hooks)

    task = asyncio.create_task(go())
    await asyncio.wait_for(called.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (row,) = await rows()
    assert (row.status, row.error_code, row.input_tokens) == ("cancelled", "", 7)
    assert await tokens() == 7


async def test_a_stream_that_is_cancelled() -> None:
    session = DjangoSession("s")
    speaker = agent(call("lookup", order="1"), say("never"), tools=[lookup])
    async with SessionHooks(session) as hooks:
        result = Runner.run_streamed(speaker, "Hi", session=session, hooks=hooks)
        async for event in result.stream_events():
            if event.type == "run_item_stream_event":
                result.cancel(mode="after_turn")
    (row,) = await rows()
    assert (row.status, row.requests) == ("cancelled", 1)


async def test_an_answer_that_a_guardrail_refuses() -> None:
    @output_guardrail
    async def never(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    session = DjangoSession("s")
    speaker = agent(say("ok"), output_guardrails=[never])
    with pytest.raises(OutputGuardrailTripwireTriggered):
        async with SessionHooks(session) as hooks:
            await Runner.run(speaker, "Hi", session=session, hooks=hooks)
    (row,) = await rows()
    assert (row.status, row.error_code, row.requests) == ("failed", "guardrail", 1)


async def test_the_callers_own_error_after_the_answer_is_not_the_runs() -> None:
    session = DjangoSession("s")

    async def go() -> None:
        async with SessionHooks(session) as hooks:
            await Runner.run(agent(say("ok")), "Hi", session=session, hooks=hooks)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await go()
    assert [row.status for row in await rows()] == ["completed"]


async def test_a_run_that_broke_off_unseen_is_closed_by_the_next() -> None:
    session = DjangoSession("s")
    with pytest.raises(MaxTurnsExceeded):
        await Runner.run(
            agent(call("lookup", order="1"), tools=[lookup]),
            "Hi",
            session=session,
            hooks=SessionHooks(session),
            max_turns=1,
        )
    (row,) = await rows()
    assert (row.status, row.requests) == ("running", 1)
    await Runner.run(
        agent(say("ok")), "Hi", session=session, hooks=SessionHooks(session)
    )
    first, second = await rows()
    assert (first.status, first.error_code) == ("interrupted", "interrupted")
    assert (first.requests, second.status) == (1, "completed")
    assert await tokens() == 14


# -- resuming --------------------------------------------------------------------------


def cashier(*steps: Any) -> Agent[Any]:
    return agent(*steps, name="cashier", tools=[refund])


async def test_a_run_that_waits_goes_on_in_another_row() -> None:
    session = DjangoSession("s")
    speaker = cashier(call("refund", order="1"), say("done", used(100)))
    hooks = SessionHooks(session)
    result = await Runner.run(speaker, "Hi", session=session, hooks=hooks)
    state = result.to_state()
    state.approve(result.interruptions[0])
    await Runner.run(speaker, state, session=session, hooks=hooks)
    before, after = await rows()
    assert (before.status, before.input_tokens) == ("interrupted", 7)
    assert (after.status, after.input_tokens, after.requests) == ("completed", 100, 1)
    assert await tokens() == 107
    turn = await session.get_turn_usage(1)
    assert isinstance(turn, dict)
    assert turn["input_tokens"] == 107


async def test_a_restored_run_counts_only_what_it_adds() -> None:
    session = DjangoSession("s")
    first = cashier(call("refund", order="1"))
    async with SessionHooks(session) as hooks:
        result = await Runner.run(first, "Hi", session=session, hooks=hooks)
    text = result.to_state().to_string()
    del result, hooks
    gc.collect()
    second = cashier(say("done", used(100)))
    state: RunState[Any] = await RunState.from_string(second, text)
    state.approve(state.get_interruptions()[0])
    async with SessionHooks(session) as hooks:
        await Runner.run(second, state, session=session, hooks=hooks)
    before, after = await rows()
    assert (before.status, before.input_tokens) == ("cancelled", 7)
    assert (after.status, after.input_tokens, after.requests) == ("completed", 100, 1)
    assert (before.turn, after.turn) == (1, 1)
    assert await tokens() == 107


# -- around it -------------------------------------------------------------------------


async def test_two_runs_at_once_are_two_rows() -> None:
    session = DjangoSession("s")
    async with SessionHooks(session) as hooks:
        await asyncio.gather(
            *(
                Runner.run(
                    agent(say("ok", used(n))), "Hi", session=session, hooks=hooks
                )
                for n in (1, 10)
            )
        )
    found = await rows()
    assert sorted(row.input_tokens for row in found) == [1, 10]
    assert {row.status for row in found} == {"completed"}
    assert await tokens() == 11


@pytest.mark.usefixtures("default_loop")
def test_run_sync_in_a_plain_block() -> None:
    session = DjangoSession("s")
    speaker = agent(call("lookup", order="1"), tools=[lookup])
    with pytest.raises(MaxTurnsExceeded), SessionHooks(session) as hooks:
        Runner.run_sync(speaker, "Hi", session=session, hooks=hooks, max_turns=1)
    # Outside of AsyncToSync the session has its own threads and connections.
    session.backend.close()
    row = AgentRun.objects.get()
    assert (row.status, row.requests, row.turn) == ("failed", 1, 1)


async def test_someone_elses_session_is_not_written_to() -> None:
    owner = await get_user_model()._default_manager.acreate(username="owner")
    await DjangoSession("s", user=owner).add_items([{"role": "user", "content": "x"}])
    model = ScriptedModel([say("never")])
    hooks = SessionHooks(DjangoSession("s"))
    with pytest.raises(SessionDoesNotExist):
        await Runner.run(Agent(name="speaker", model=model), "Hi", hooks=hooks)
    assert not model.calls
    assert await rows() == []


async def test_the_trace_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    current = SimpleNamespace(trace_id="trace_1")
    monkeypatch.setattr(
        "agent_sessions.runs.external.get_current_trace", lambda: current
    )
    session = DjangoSession("s")
    hooks = SessionHooks(session)
    await Runner.run(agent(say("ok")), "Hi", session=session, hooks=hooks)
    assert [row.trace_id for row in await rows()] == ["trace_1"]
