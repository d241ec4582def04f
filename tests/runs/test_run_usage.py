"""What runs of the run manager used, however they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, function_tool
from django.core.cache import cache

from agent_sessions import DjangoSession, sessions
from agent_sessions.agui import RunRequest
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import Conversation, RunLimits, RunSetup, get_run_manager
from agent_sessions.runs.active import ActiveRun
from tests.runs.test_runs import approve
from tests.support.approvals import lookup, refund
from tests.support.chat import Socket
from tests.support.usages import agent, call, say, standing, used
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    cache.clear()
    yield
    # After a socket, the session's own threads and connections may have served.
    sessions.database(None).close()
    sessions["default"].close()


@function_tool(failure_error_function=None)
def fail() -> str:
    """Fail."""
    raise RuntimeError("no")


async def start(
    speaker: Agent[Any], limits: RunLimits | None = None
) -> tuple[ActiveRun, DjangoSession]:
    """Start a run without a socket."""
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    request = RunRequest(
        session_id, "r-1", [{"id": "u", "role": "user", "content": "Hi"}]
    )
    setup = RunSetup(speaker, limits=limits or RunLimits())
    run = await get_run_manager().start(found, request, setup)
    assert run is not None
    return run, DjangoSession(session_id, user=user)


async def ended(run: ActiveRun) -> AgentRun:
    """Wait for a run's row to be closed."""
    tasks = get_run_manager()._tasks
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert run.ended
    return await AgentRun.objects.aget(run_id=run.run_id)


async def assert_counted(session: DjangoSession, tokens: int, turns: int = 1) -> None:
    """Compare the session's counters, rows and answers with each other."""
    row = await AgentSession.objects.aget(session_id=session.session_id)
    assert row.input_tokens == tokens
    usage = await session.get_session_usage()
    assert usage is not None
    assert (usage["input_tokens"], usage["total_turns"]) == (tokens, turns)
    runs = [run.input_tokens async for run in row.runs.all()]
    assert sum(runs) == tokens


async def test_a_completed_run() -> None:
    run, session = await start(
        agent(call("lookup", order="1"), say("ok"), tools=[lookup])
    )
    row = await ended(run)
    assert (row.status, row.requests, row.total_tokens) == ("completed", 2, 16)
    assert len(row.usage["request_usage_entries"]) == 2
    assert row.turn == 1
    await assert_counted(session, 14)


async def test_a_failed_run() -> None:
    run, session = await start(agent(call("fail"), tools=[fail]))
    row = await ended(run)
    assert (row.status, row.requests) == ("failed", 1)
    await assert_counted(session, 7)


async def test_a_cancelled_run() -> None:
    """openai-agents #1895: what a cancelled run had used was lost."""
    tool, called = standing()
    run, session = await start(agent(call("stand_still"), tools=[tool]))
    await asyncio.wait_for(called.wait(), 10)
    run.abort()
    row = await ended(run)
    assert (row.status, row.requests) == ("cancelled", 1)
    await assert_counted(session, 7)


async def test_a_run_that_is_stopped_after_its_turn() -> None:
    called, gate = asyncio.Event(), asyncio.Event()

    async def pass_gate() -> str:
        """Wait for the test."""
        called.set()
        await gate.wait()
        return "passed"

    speaker = agent(call("pass_gate"), say("never"), tools=[function_tool(pass_gate)])
    run, session = await start(speaker)
    await asyncio.wait_for(called.wait(), 10)
    run.abort("after_turn")
    gate.set()
    row = await ended(run)
    assert (row.status, row.requests) == ("cancelled", 1)
    await assert_counted(session, 7)


async def test_a_run_that_took_too_long() -> None:
    tool, _ = standing()
    run, session = await start(
        agent(call("stand_still"), tools=[tool]), RunLimits(run_timeout=0.3)
    )
    row = await ended(run)
    assert (row.status, row.error_code, row.requests) == ("failed", "timeout", 1)
    await assert_counted(session, 7)
    # Nothing goes on in the background and costs more.
    assert run._result is not None
    task = run._result.run_loop_task
    assert task is None or task.done()


async def test_a_run_that_the_loop_cancels() -> None:
    tool, called = standing()
    limits = RunLimits(grace=0)
    run, session = await start(agent(call("stand_still"), tools=[tool]), limits)
    await asyncio.wait_for(called.wait(), 10)
    await get_run_manager().shutdown()
    row = await ended(run)
    assert (row.status, row.requests) == ("interrupted", 1)
    await assert_counted(session, 7)


async def test_a_resumed_run_counts_each_part_once() -> None:
    user, session_id = await conversation()
    steps = [call("refund", order="1"), say("done", used(100))]
    async with Socket(session_id, user, agent(*steps, tools=[refund])) as tab:
        await tab.say("r-1", "Refund order 1")
        await tab.to_end()
        await tab.answer("r-2", approve())
        await tab.to_end()
    runs = [run async for run in AgentRun.objects.order_by("pk")]
    assert [run.input_tokens for run in runs] == [7, 100]
    assert [len(run.usage["request_usage_entries"]) for run in runs] == [1, 1]
    assert [run.turn for run in runs] == [1, 1]
    session = DjangoSession(session_id, user=user)
    await assert_counted(session, 107)
    turn = await session.get_turn_usage(1)
    assert isinstance(turn, dict)
    assert (turn["requests"], turn["input_tokens"], turn["total_tokens"]) == (
        2,
        107,
        109,
    )


async def test_store_run_usage_after_such_a_run_counts_nothing_twice() -> None:
    run, session = await start(agent(say("ok")))
    await ended(run)
    assert run._result is not None
    await session.store_run_usage(run._result)
    await assert_counted(session, 7)
    assert await AgentRun.objects.acount() == 1


async def test_a_run_that_was_cleared_belongs_to_no_turn() -> None:
    """Its cost stays on the session; what is said afterwards isn't charged with it."""
    tool, called = standing()
    run, session = await start(agent(call("stand_still"), tools=[tool]))
    await asyncio.wait_for(called.wait(), 10)
    await session.clear_session()
    await session.add_items([{"role": "user", "content": "Anew"}])
    run.abort()
    row = await ended(run)
    assert (row.requests, row.turn, row.turn_item) == (1, 0, None)
    assert await session.get_session_usage() is None
    stored = await AgentSession.objects.aget(session_id=session.session_id)
    assert stored.input_tokens == 7


async def test_several_turns() -> None:
    user, session_id = await conversation()
    speaker = agent(say("one", used(1)), say("two", used(10)))
    async with Socket(session_id, user, speaker) as tab:
        for number in (1, 2):
            await tab.say(f"r-{number}", "Hi")
            await tab.to_end()
    session = DjangoSession(session_id, user=user)
    turns: Any = await session.get_turn_usage()
    assert [(turn["user_turn_number"], turn["input_tokens"]) for turn in turns] == [
        (1, 1),
        (2, 10),
    ]
    await assert_counted(session, 11, turns=2)
