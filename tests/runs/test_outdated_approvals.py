"""Approvals after a deploy: the agent that asked has another name now."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from agents import (
    Agent,
    ApplyPatchTool,
    CustomTool,
    Model,
    ModelResponse,
    ShellTool,
)
from agents.items import TResponseOutputItem
from agents.testing import ScriptedModel, assistant_message
from django.core.cache import cache
from pydantic import TypeAdapter

from agent_sessions.items.kinds import CALL_OF
from agent_sessions.models import AgentRun, AgentSession
from example_project.demo_stream import stream
from tests.runs.test_runs import approve, cashier
from tests.support.approvals import refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.gated import USAGE
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


# -- other tools than functions ----------------------------------------------------------

ITEM: TypeAdapter[TResponseOutputItem] = TypeAdapter(TResponseOutputItem)
PATCH = {"type": "create_file", "path": "a", "diff": "+x"}
SHELL = {"commands": ["ls"], "max_output_length": 9, "timeout_ms": 9}
CALLS: dict[str, Any] = {
    "shell": {"type": "shell_call", "action": SHELL},
    "apply_patch": {"type": "apply_patch_call", "operation": PATCH},
    "grammar": {"type": "custom_tool_call", "name": "grammar", "input": "abc"},
}


class Whole(Model):
    """Streams one output item whole: scripts know messages and functions only."""

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = ITEM.validate_python(item)

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        raise AssertionError("runs over a socket are streamed")

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        for event in stream([self.item], USAGE):
            yield event


async def run_custom(context: Any, text: str) -> str:
    raise AssertionError("it was not approved")


def tools() -> list[Any]:
    editor: Any = object()
    return [
        ShellTool(executor=lambda request: "", needs_approval=True),
        ApplyPatchTool(editor=editor, needs_approval=True),
        CustomTool(
            name="grammar",
            description="Parse.",
            format={"type": "text"},
            on_invoke_tool=run_custom,
            needs_approval=True,
        ),
    ]


@pytest.mark.parametrize("name", CALLS)
async def test_a_person_sees_what_any_tool_was_given_and_refuses_it(name: str) -> None:
    item = {"id": "i_1", "call_id": "call_1", "status": "completed", **CALLS[name]}
    user, session_id = await conversation()
    asking = Agent(name="cashier", model=Whole(item), tools=tools())
    async with Socket(session_id, user, asking) as tab:
        await tab.say("r-1", "Do it")
        (asked,) = (await tab.to_end())[-1]["outcome"]["interrupts"]
    shown = asked["metadata"]
    assert shown["toolName"] == name
    assert any(word in shown["arguments"] for word in ("ls", "create_file", "abc"))
    agent = renamed("I did not.")
    async with Socket(session_id, user, agent) as later:
        later.asked = tab.asked
        await later.answer("r-2", approve("call_1", approved=False, reason="no"))
        assert (await later.to_end())[-1]["outcome"] == {"type": "success"}
    # The model is told of the call and of the refusal, each in the type that fits.
    assert isinstance(agent.model, ScriptedModel)
    call, output = agent.model.calls[0].input[-2:]
    assert call["type"] == item["type"]
    assert CALL_OF[output["type"]] == item["type"]
    assert output["call_id"] == "call_1"
    assert "no" in str(output["output"])


async def test_a_tool_that_is_gone_is_not_approved() -> None:
    user, session_id, asked = await paused()
    agent = Agent(name="cashier", model=ScriptedModel([[assistant_message("fine")]]))
    async with Socket(session_id, user, agent) as tab:
        tab.asked = asked
        await tab.answer("r-2", approve("call_1"))
        assert (await tab.frame())["chunk"]["code"] == "outdated_approval"
        await tab.say("r-3", "Hello?")
        assert text_of(await tab.to_end()) == "fine"


async def test_a_tool_that_is_gone_can_be_refused() -> None:
    user, session_id, asked = await paused()
    agent = Agent(name="cashier", model=ScriptedModel([[assistant_message("fine")]]))
    async with Socket(session_id, user, agent) as tab:
        tab.asked = asked
        await tab.answer("r-2", approve("call_1", approved=False))
        assert text_of(await tab.to_end()) == "fine"
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output", "message"]
