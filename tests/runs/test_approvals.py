"""Approvals that nobody answers, and runs that die while they carry one out."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest
from agents import Agent, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.cache import cache
from django.db import connection, transaction
from django.utils import timezone

from agent_sessions import approvals, get_session
from agent_sessions.exceptions import (
    LeaseLost,
    RunPaused,
    SessionDoesNotExist,
    UnknownInterrupt,
)
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import (
    Conversation,
    RunLimits,
    answer_run,
    records,
    recovery,
    start_run,
)
from tests.runs.test_runs import approve, cashier
from tests.support.approvals import refunded
from tests.support.chat import Socket, text_of
from tests.websocket.test_consumer import conversation, items_of

pytestmark = pytest.mark.django_db(transaction=True)

LIMITS = RunLimits()


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


def outputs_sent(agent: Agent[Any], call: int = -1) -> list[tuple[str, str]]:
    """Return what a model was told of calls, each with the call's id."""
    assert isinstance(agent.model, ScriptedModel)
    sent = agent.model.calls[call].input
    made = [i["call_id"] for i in sent if i.get("type") == "function_call"]
    told = [i for i in sent if i.get("type") == "function_call_output"]
    assert made == [i["call_id"] for i in told]
    return [(i["call_id"], i["output"]) for i in told]


# -- writing on ------------------------------------------------------------------------


async def test_a_new_message_closes_what_waits() -> None:
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.say("r-2", "Leave it. Hello?")
        assert text_of(await tab.to_end()) == "done"
        await tab.answer("r-3", approve())
        assert (await tab.frame())["chunk"]["code"] == "unknown_interrupt"
    assert refunded == []
    assert outputs_sent(agent) == [("call_1", "Tool execution was not approved.")]
    assert [(kind, role) for kind, role, _ in await items_of(session_id)] == [
        ("message", "user"),
        ("function_call", ""),
        ("function_call_output", ""),
        ("message", "user"),
        ("message", "assistant"),
    ]
    first = await AgentRun.objects.aget(run_id="r-1")
    assert (first.status, first.state) == ("cancelled", "")


async def test_the_same_message_again_is_a_new_one() -> None:
    user, session_id = await conversation()
    again = [function_call("refund", {"order": "42"}, call_id="call_2")]
    model = ScriptedModel(
        [[function_call("refund", {"order": "42"}, call_id="call_1")], again]
    )
    agent: Agent[Any] = cashier().clone(model=model)
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Refund order 42")
            assert (await tab.to_end())[-1]["outcome"]["type"] == "interrupt"
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output", *kinds[:2]]


async def test_time_that_is_over_closes_what_waited() -> None:
    user, session_id = await conversation()
    agent = cashier()
    limits = RunLimits(approval_timeout=timedelta(0), must_answer=True)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.say("r-2", "Hello?")
        assert text_of(await tab.to_end()) == "done"
    assert outputs_sent(agent) == [("call_1", "Tool execution was not approved.")]


# -- a run that dies after the click ---------------------------------------------------


async def claimed(
    session_id: str, user: Any, run_id: str = "r-2"
) -> tuple[Conversation, records.Lease]:
    """Claim what waits, as a process does that dies before it goes on."""
    here = await Conversation.find(session_id, user=user)
    found = await sync_to_async(approvals.pending)(here.backend, here.key, here.pk)
    lease = await sync_to_async(records.begin)(
        here, run_id, model="", limits=LIMITS, after=found
    )
    assert lease is not None
    return here, lease


async def die(here: Conversation) -> None:
    """Leave a lease as a process does that was killed a while ago."""
    long_ago = timezone.now() - timedelta(minutes=5)
    await here.rows().aupdate(run_owner="elsewhere:1:1", run_seen_at=long_ago)


async def test_what_was_not_begun_waits_again() -> None:
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    here, _ = await claimed(session_id, user)
    await die(here)
    async with Socket(session_id, user, agent) as later:
        await later.sync()
        (asked,) = (await later.to_end())[-1]["outcome"]["interrupts"]
        assert asked["id"] == tab.asked["call_1"]
        assert refunded == []
        await later.answer("r-3", approve())
        assert text_of(await later.to_end()) == "done"
    assert refunded == ["42"]
    assert outputs_sent(agent) == [("call_1", "refunded 42")]
    runs = AgentRun.objects.order_by("pk").values_list("run_id", "status", "state")
    assert [run async for run in runs] == [
        (name, "completed", "") for name in ("r-1", "r-2", "r-3")
    ]


@pytest.mark.parametrize("first", ["dies", "gives back"])
async def test_two_runs_die_after_the_click(first: str) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        here, lease = await claimed(session_id, user)
        if first == "dies":
            await die(here)
            await sync_to_async(recovery.recover)(here, LIMITS.stale_after)
        else:
            await sync_to_async(records.give_back)(here, lease)
        await claimed(session_id, user, "r-3")
        await die(here)
        await tab.answer("r-4", approve())
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]


async def test_a_click_on_a_page_left_open_works_at_once() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        here, _ = await claimed(session_id, user)
        await die(here)
        await tab.answer("r-3", approve())
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]


async def test_what_was_begun_is_not_asked_again() -> None:
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    here, lease = await claimed(session_id, user)
    await sync_to_async(records.spend)(here, lease)
    await die(here)
    async with Socket(session_id, user, agent) as later:
        later.asked = tab.asked
        await later.answer("r-3", approve())
        assert (await later.frame())["chunk"]["code"] == "unknown_interrupt"
        await later.say("r-4", "And now?")
        assert text_of(await later.to_end()) == "done"
    assert refunded == []
    unknown = "This call was started; its result is not known."
    assert outputs_sent(agent) == [("call_1", unknown)]


async def test_a_run_that_was_taken_for_dead_begins_no_call() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    here, lease = await claimed(session_id, user)
    await die(here)
    await sync_to_async(recovery.recover)(here, LIMITS.stale_after)
    assert (await AgentSession.objects.aget()).state == "waiting"
    with pytest.raises(LeaseLost):
        await sync_to_async(records.spend)(here, lease)


async def test_a_call_waits_for_a_recovery_that_is_going_on() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    here, lease = await claimed(session_id, user)
    await die(here)
    begun, go_on = threading.Event(), threading.Event()

    def recover() -> None:
        with transaction.atomic():
            recovery.recover(here, LIMITS.stale_after)
            begun.set()
            go_on.wait(10)
        connection.close()

    thread = threading.Thread(target=recover)
    thread.start()
    assert await asyncio.to_thread(begun.wait, 10)
    spend = here.backend.threads.run(records.spend, here, lease)
    spending = asyncio.ensure_future(spend)
    # So that it begins before the other commits; it can't end before.
    await asyncio.wait({spending}, timeout=0.5)
    go_on.set()
    with pytest.raises(LeaseLost):
        await spending
    await asyncio.to_thread(thread.join)
    assert (await AgentSession.objects.aget()).state == "waiting"


async def test_a_lease_that_is_given_back_waits_again() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        here, lease = await claimed(session_id, user)
        await sync_to_async(records.give_back)(here, lease)
        await tab.answer("r-3", approve())
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]


async def test_a_call_that_is_stopped_leaves_an_output() -> None:
    begun = asyncio.Event()

    @function_tool(needs_approval=True)
    async def refund(order: str) -> str:
        begun.set()
        await asyncio.Event().wait()
        return order

    user, session_id = await conversation()
    agent = cashier()
    agent.tools = [refund]
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-2", approve())
        await begun.wait()
        await tab.send({"type": "abort", "runId": "r-2"})
        assert (await tab.to_end())[-1]["outcome"] == {"type": "cancelled"}
    items = await get_session(session_id, user=user).get_items()
    assert [item.get("type") for item in items][-2:] == [
        "function_call",
        "function_call_output",
    ]
    assert (await AgentRun.objects.aget(run_id="r-1")).state == ""


# -- by code ---------------------------------------------------------------------------


def twice() -> Agent[Any]:
    """Return an agent that asks for two refunds at once, and for a third later."""
    first = [
        function_call("refund", {"order": order}, call_id=f"call_{order}")
        for order in ("1", "2")
    ]
    third = [function_call("refund", {"order": "3"}, call_id="call_3")]
    steps = [first, third, [assistant_message("done")]]
    return cashier().clone(model=ScriptedModel(steps))


async def test_code_answers_each_call_with_a_reason() -> None:
    user, session_id = await conversation()
    agent = twice()
    place: Any = {"session_id": session_id, "user": user}
    run = await start_run(agent, "Refund 1 and 2", **place)
    with pytest.raises(RunPaused):
        await run.result()
    with pytest.raises(UnknownInterrupt):
        await answer_run(agent, {"call_1": True}, **place)
    answers = {"call_1": True, "call_2": False}
    run = await answer_run(agent, answers, reason="too much", **place)
    with pytest.raises(RunPaused):
        await run.result()
    assert refunded == ["1"]
    assert ("call_2", "too much") in outputs_sent(agent)
    run = await answer_run(agent, True, **place)
    assert await run.result() == "done"
    assert refunded == ["1", "3"]
    with pytest.raises(UnknownInterrupt):
        await answer_run(agent, True, **place)


async def test_a_lasting_answer_is_not_asked_for_again() -> None:
    user, session_id = await conversation()
    agent = twice()
    place: Any = {"session_id": session_id, "user": user}
    run = await start_run(agent, "Refund 1 and 2", **place)
    await run.ended()
    run = await answer_run(agent, True, always=True, **place)
    assert await run.result() == "done"
    assert refunded == ["1", "2", "3"]


async def test_nobody_elses_approval_is_answered() -> None:
    user, session_id = await conversation()
    agent = cashier()
    run = await start_run(agent, "Refund", session_id=session_id, user=user)
    await run.ended()
    for other in (None, await get_user_model()._default_manager.acreate(username="o")):
        with pytest.raises(SessionDoesNotExist):
            await answer_run(agent, True, session_id=session_id, user=other)
    assert refunded == []


@pytest.mark.parametrize("kind", ["tool", "handoff"])
async def test_approvals_of_nested_agents_are_answered(kind: str) -> None:
    inner: Agent[Any] = cashier()
    if kind == "tool":
        model = ScriptedModel(
            [
                [function_call("ask_cashier", {"input": "Refund"}, call_id="call_0")],
                [assistant_message("all done")],
            ]
        )
        tool = inner.as_tool("ask_cashier", "Refund.")
        outer: Agent[Any] = Agent(name="desk", model=model, tools=[tool])
    else:
        model = ScriptedModel(
            [[function_call("transfer_to_cashier", {}, call_id="call_0")]]
        )
        outer = Agent(name="desk", model=model, handoffs=[inner])
    user, session_id = await conversation()
    place: Any = {"session_id": session_id, "user": user}
    run = await start_run(outer, "Refund", **place)
    with pytest.raises(RunPaused):
        await run.result()
    run = await answer_run(outer, True, **place)
    assert await run.result() == ("all done" if kind == "tool" else "done")
    assert refunded == ["42"]
