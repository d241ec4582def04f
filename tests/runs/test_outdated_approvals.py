"""Approvals after a deploy: the agent that asked has another name now."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from django.core.cache import cache

from agent_sessions.models import AgentRun, AgentSession
from tests.runs.test_runs import approve, cashier
from tests.support.approvals import refund, refunded
from tests.support.chat import Socket, text_of
from tests.websocket.test_consumer import conversation, items_of

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


async def paused() -> tuple[Any, str, dict[str, str]]:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    return user, session_id, tab.asked


def renamed(*answers: str) -> Agent[Any]:
    model = ScriptedModel([[assistant_message(text)] for text in answers])
    return Agent(name="till", model=model, tools=[refund])


async def test_an_approval_that_can_not_be_read_is_withdrawn() -> None:
    user, session_id, asked = await paused()
    async with Socket(session_id, user, renamed("fine")) as tab:
        tab.asked = asked
        await tab.answer("r-2", approve("call_1"))
        refusal = (await tab.frame())["chunk"]
        assert refusal["code"] == "outdated_approval"
        assert "has changed" in refusal["message"]
        # The conversation goes on at once.
        await tab.say("r-3", "Hello?")
        assert text_of(await tab.to_end()) == "fine"
    assert refunded == []
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.error_code) == ("cancelled", "outdated_approval")


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_refusal_needs_no_state(cancelled: bool) -> None:
    user, session_id, asked = await paused()
    answer = approve("call_1", approved=False, reason="too much")
    if cancelled:
        answer = {"interruptId": "call_1", "status": "cancelled"}
    agent = renamed("I did not.")
    async with Socket(session_id, user, agent) as tab:
        tab.asked = asked
        await tab.answer("r-2", answer)
        events = await tab.to_end()
    assert text_of(events) == "I did not."
    assert events[-1]["outcome"] == {"type": "success"}
    assert refunded == []
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output", "message"]
    assert isinstance(agent.model, ScriptedModel)
    told = agent.model.calls[0].input[-1]
    reason = "Tool execution was not approved." if cancelled else "too much"
    assert (told["call_id"], told["output"]) == ("call_1", reason)
    first = await AgentRun.objects.select_related("resumed_by").aget(run_id="r-1")
    assert first.status == "completed"
    assert first.resumed_by is not None
    row = await AgentSession.objects.aget(session_id=session_id)
    assert row.state == "idle"
