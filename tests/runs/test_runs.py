"""Approvals, leases, fencing: what a run owes to other runs and processes."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import pytest
from agents import Agent, RunState
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.utils import timezone

from agent_sessions import DjangoSession, get_session
from agent_sessions.backends.leases import is_dead, this_process
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, Subscription
from agent_sessions.runs.log import Frame
from tests.support.approvals import lookup, refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.support.waiting import opened
from tests.websocket.test_consumer import conversation, items_of, speaker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


def cashier(*more: Any) -> Agent[Any]:
    steps = [
        [function_call("refund", {"order": "42"}, call_id="call_1")],
        [assistant_message("done")],
        *more,
    ]
    return Agent(name="cashier", model=ScriptedModel(steps), tools=[refund, lookup])


def approve(call_id: str = "call_1", **payload: Any) -> dict[str, Any]:
    return {
        "interruptId": call_id,
        "status": "resolved",
        "payload": {"approved": True, **payload},
    }


async def refused(tab: Socket, run_id: str) -> str | None:
    """Read on until a tab's answer has run to its end or is refused; give the code."""
    while True:
        event = (await tab.frame())["chunk"]
        if event["type"] == "RUN_ERROR" and event["metadata"]["runId"] == run_id:
            return str(event["code"])
        if event["type"] == "RUN_FINISHED" and event["runId"] == run_id:
            return None


# -- approvals -------------------------------------------------------------------------


async def test_a_tool_waits_for_approval_and_then_runs_once() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        events = await tab.to_end()
        (interrupt,) = events[-1]["outcome"]["interrupts"]
        assert interrupt["toolCallId"] == "call_1"
        assert interrupt["metadata"]["toolName"] == "refund"
        row = await AgentSession.objects.aget(session_id=session_id)
        assert row.state == "waiting"
        assert refunded == []
        await tab.answer("r-2", approve())
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]
    first = await AgentRun.objects.aget(run_id="r-1")
    second = await AgentRun.objects.aget(run_id="r-2")
    assert (first.status, first.state, first.resumed_by_id) == (
        "completed",
        "",
        second.pk,
    )
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output", "message"]


async def test_a_refusal_reaches_the_model_with_its_reason() -> None:
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        answer = approve(approved=False, reason="too late")
        await tab.answer("r-2", answer)
        await tab.to_end()
    assert refunded == []
    assert isinstance(agent.model, ScriptedModel)
    assert agent.model.calls[1].input[-1]["output"] == "too late"


async def test_two_clicks_run_the_tool_once() -> None:
    """openai-agents-js 929: a replay repeats side effects."""
    user, session_id = await conversation()
    agent = cashier()
    async with (
        Socket(session_id, user, agent) as one,
        Socket(session_id, user, agent) as two,
    ):
        await one.say("r-1", "Refund order 42")
        await one.to_end()
        await one.answer("r-2", approve())
        await two.answer("r-3", approve())
        # Either may win; the other's socket is told, and both see the run.
        refusals = await asyncio.gather(refused(one, "r-2"), refused(two, "r-3"))
    assert refunded == ["42"]
    (code,) = (code for code in refusals if code)
    assert code in {"session_busy", "unknown_interrupt"}


async def test_the_approval_is_asked_again_after_a_reload() -> None:
    """openai-agents-python 4244: approvals get lost."""
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        asked = (await tab.to_end())[-1]["outcome"]
    async with Socket(session_id, user, agent) as tab:
        await tab.sync()
        events = await tab.to_end()
        assert events[-1]["outcome"] == asked
        await tab.answer("r-2", approve())
        assert text_of(await tab.to_end()) == "done"


async def test_nothing_else_is_said_where_approvals_must_be_answered() -> None:
    """Else the output would be stored after newer messages."""
    user, session_id = await conversation()
    limits = RunLimits(must_answer=True)
    async with Socket(session_id, user, cashier(), limits=limits) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.say("r-2", "Hello?")
        assert (await tab.frame())["chunk"]["code"] == "interrupts_pending"
        await tab.answer("r-3", approve("call_9"))
        assert (await tab.frame())["chunk"]["code"] == "unknown_interrupt"
        await tab.answer("r-4", approve())
        assert text_of(await tab.to_end()) == "done"


async def test_an_approval_has_its_time() -> None:
    user, session_id = await conversation()
    agent = cashier([assistant_message("again")])
    limits = RunLimits(approval_timeout=timedelta(seconds=0))
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-2", approve())
        assert (await tab.frame())["chunk"]["code"] == "interrupt_expired"
        await tab.say("r-3", "Hello?")
        await tab.to_end()
    assert refunded == []
    assert (await AgentRun.objects.aget(run_id="r-1")).status == "cancelled"


async def test_what_waits_does_not_hold_the_context() -> None:
    user, session_id = await conversation()
    from agent_sessions.consumers import AgentConsumer

    class WithContext(AgentConsumer):
        async def get_context(self) -> dict[str, Any]:
            return {"user": self.user, "token": "hush"}

    async with Socket(session_id, user, cashier(), consumer=WithContext) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        run = await AgentRun.objects.aget(run_id="r-1")
        assert "hush" not in run.state
        state = (await sync_to_async(opened)("r-1")).state
        await RunState.from_string(cashier(), state, context_override={})
        await tab.answer("r-2", approve())
        assert text_of(await tab.to_end()) == "done"


async def test_usage_of_a_resumed_run_is_not_counted_twice() -> None:
    from agents.testing import ModelStep
    from agents.usage import Usage

    used = Usage(requests=1, input_tokens=7, output_tokens=1, total_tokens=8)
    steps = [
        ModelStep(
            output=[function_call("refund", {"order": "1"}, call_id="call_1")],
            usage=used,
        ),
        ModelStep(output=[assistant_message("done")], usage=used),
    ]
    user, session_id = await conversation()
    agent = Agent(name="cashier", model=ScriptedModel(steps), tools=[refund])
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 1")
        await tab.to_end()
        await tab.answer("r-2", approve())
        await tab.to_end()
    tokens = [run.input_tokens async for run in AgentRun.objects.order_by("pk")]
    assert tokens == [7, 7]
    row = await AgentSession.objects.aget(session_id=session_id)
    assert row.input_tokens == 14


# -- the lease -------------------------------------------------------------------------


async def occupy(session_id: str, **values: Any) -> None:
    """Pretend that a process took the lease and went away."""
    row = await AgentSession.objects.aget(session_id=session_id)
    await AgentRun.objects.acreate(session=row, run_id="lost")
    values = {"run_seen_at": timezone.now(), "run_owner": "elsewhere:1:x", **values}
    await AgentSession.objects.filter(pk=row.pk).aupdate(
        run_id="lost", state="running", fence=7, **values
    )


async def test_a_run_of_another_host_holds_the_session_while_it_is_alive() -> None:
    user, session_id = await conversation()
    await occupy(session_id)
    async with Socket(session_id, user, speaker("no")) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.frame())["chunk"]["code"] == "session_busy"


async def test_a_run_that_fell_silent_is_replaced() -> None:
    user, session_id = await conversation()
    await occupy(session_id, run_seen_at=timezone.now() - timedelta(seconds=61))
    async with Socket(session_id, user, speaker("yes")) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"
    lost = await AgentRun.objects.aget(run_id="lost")
    assert (lost.status, lost.error_code) == ("interrupted", "interrupted")
    row = await AgentSession.objects.aget(session_id=session_id)
    assert row.fence > 7


async def test_a_run_of_a_dead_process_is_replaced_at_once() -> None:
    user, session_id = await conversation()
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    host = this_process().partition(":")[0]
    owner = f"{host}:{child.pid}:abc"
    await child.wait()
    assert is_dead(owner)
    await occupy(session_id, run_owner=owner)
    async with Socket(session_id, user, speaker("yes")) as tab:
        await tab.sync()
        events = await tab.to_end()
        assert events[-1]["code"] == "interrupted"
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"


def test_only_a_process_of_this_host_can_be_called_dead() -> None:
    host, pid, _ = this_process().split(":")
    assert not is_dead(this_process())
    assert not is_dead("")
    assert not is_dead("otherhost:1:abc")
    assert not is_dead(f"{host}:1:abc")
    assert is_dead(f"{host}:{pid}:othertoken")


async def test_a_run_that_lost_its_lease_cannot_write() -> None:
    user, session_id = await conversation()
    session = get_session(session_id, user=user)
    await session.add_items([{"role": "user", "content": "before"}])
    late = session.fenced(0)
    await AgentSession.objects.filter(session_id=session_id).aupdate(fence=1)
    with pytest.raises(LeaseLost, match="Nothing was written"):
        await late.add_items([{"role": "user", "content": "late"}])
    await session.fenced(1).add_items([{"role": "user", "content": "in time"}])
    assert len(await session.get_items()) == 2


async def test_a_run_whose_session_is_cleared_writes_nothing_more() -> None:
    """Chainlit 1684: a deleted thread reappears."""
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await DjangoSession(session_id, user=user).clear_session()
        model.gate.set()
        events = await tab.to_end()
    assert events[-1]["code"] == "interrupted"
    assert await items_of(session_id) == []
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.item_count) == ("idle", 0)


async def test_a_run_whose_session_is_deleted_brings_nothing_back() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        row = await AgentSession.objects.aget(session_id=session_id)
        await sync_to_async(row.delete)()
        model.gate.set()
        await tab.to_end()
    assert not await AgentSession.objects.filter(session_id=session_id).aexists()


async def test_the_heartbeat_notices_a_lost_lease() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    limits = RunLimits(heartbeat=0.05)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        before = await AgentSession.objects.aget(session_id=session_id)
        await asyncio.sleep(0.12)
        after = await AgentSession.objects.aget(session_id=session_id)
        assert before.run_seen_at
        assert after.run_seen_at
        assert after.run_seen_at > before.run_seen_at
        await AgentSession.objects.filter(pk=before.pk).aupdate(fence=99, run_id="b")
        events = await tab.to_end()
    assert events[-1]["code"] == "interrupted"
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.run_id, row.fence) == ("b", 99)


# -- the log and its listeners ---------------------------------------------------------


async def test_a_frame_that_comes_twice_is_told_once() -> None:
    listener = Subscription()
    listener.put(Frame("r", 1, {"type": "RUN_STARTED", "runId": "r"}))
    for number in (2, 2, 3):
        listener.put(Frame("r", number, {"type": "CUSTOM"}))
    numbers = [(await listener.get()).number for _ in range(3)]  # type: ignore[union-attr]
    assert numbers == [1, 2, 3]


async def test_a_hole_asks_for_a_sync() -> None:
    listener = Subscription()
    listener.put(Frame("r", 1, {"type": "RUN_STARTED", "runId": "r"}))
    await listener.get()
    listener.put(Frame("r", 3, {"type": "CUSTOM"}))
    assert await listener.get() is None
