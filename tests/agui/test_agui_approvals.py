"""Pauses for approval, and what resumes from them."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from agents import (
    RunState,
)
from agents.testing import assistant_message, function_call

from agent_sessions.agui import (
    EventMapper,
    add_pending_calls,
    interrupts,
)
from tests.support.agui_runs import FULL, run
from tests.support.agui_samples import (
    NAMES,
    NONE,
    add,
    agent,
    refund,
)
from tests.support.agui_validator import validate_event

APPROVAL_RUN = (
    [
        function_call("refund", {"order": 42}, call_id="call_1"),
        function_call("add", {"a": 1, "b": 2}, call_id="call_2"),
    ],
    [assistant_message("Refunded")],
)


async def test_a_pause_for_approval_is_an_interrupt() -> None:
    mapped = await run(agent(*APPROVAL_RUN, tools=[refund, add]), options=NAMES)
    assert mapped.kinds[-3:] == ["STEP_FINISHED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]
    outcome = mapped.events[-1]["outcome"]
    assert outcome == {
        "type": "interrupt",
        "interrupts": [
            {
                "id": outcome["interrupts"][0]["id"],
                "reason": "tool_call",
                "toolCallId": "call_1",
                "responseSchema": {
                    "type": "object",
                    "properties": {
                        "approved": {"type": "boolean"},
                        "reason": {"type": "string"},
                        "always": {"type": "boolean"},
                    },
                    "required": ["approved"],
                },
                # Under every exposure: a person has to decide on it.
                "metadata": {"toolName": "refund", "arguments": '{"order":42}'},
            }
        ],
    }
    roles = [(m["role"], m["id"]) for m in mapped.events[-2]["messages"]]
    assert roles == [
        ("user", "item-0"),
        ("assistant", "call_1"),
        ("assistant", "call_2"),
        ("tool", "call_2:result"),
    ]


async def test_interrupts_can_carry_a_question_and_an_expiry() -> None:
    mapped = await run(agent(*APPROVAL_RUN, tools=[refund, add]))
    made = interrupts(
        mapped.result.interruptions,
        datetime(2030, 1, 2, tzinfo=UTC),
        message=lambda tool: f"May {tool} run?",
    )
    assert made[0]["message"] == "May refund run?"
    assert made[0]["expiresAt"] == "2030-01-02T00:00:00+00:00"
    assert json.loads(json.dumps(made)) == made
    mapper = EventMapper(thread_id="t", run_id="r")
    assert mapper.interrupted(made, messages=[])[-1]["outcome"]["interrupts"] == made


async def test_a_held_back_call_is_added_to_the_snapshot() -> None:
    mapped = await run(agent(*APPROVAL_RUN, tools=[refund, add]))
    items = interrupts(mapped.result.interruptions)
    for options, calls in ((FULL, 1), (NAMES, 1), (NONE, 0)):
        mapper = EventMapper(thread_id="t", run_id="r", options=options)
        shot = mapper.interrupted(items, messages=[])[0]
        validate_event(shot)
        assert len(shot["messages"]) == calls


@pytest.mark.parametrize("approve", [True, False])
async def test_a_resumed_run_shows_the_result_of_the_call(approve: bool) -> None:
    support = agent(*APPROVAL_RUN, tools=[refund, add])
    paused = await run(support)
    state = await RunState.from_string(support, paused.result.to_state().to_string())
    for item in state.get_interruptions():
        if approve:
            state.approve(item)
        else:
            state.reject(item, rejection_message="Too much")
    mapped = await run(support, state, run_id="r-2")
    results = mapped.of("TOOL_CALL_RESULT")
    assert [event["toolCallId"] for event in results] == ["call_1"]
    assert results[0]["content"] == ("refunded 42" if approve else "Too much")
    assert mapped.text() == "Refunded"
    assert mapped.events[-1]["outcome"] == {"type": "success"}


async def test_a_nested_approval_names_the_inner_call() -> None:
    inner = agent(
        [function_call("refund", {"order": 7}, call_id="inner")],
        [assistant_message("ok")],
        name="Inner",
        tools=[refund],
    )
    mapped = await run(
        agent(
            [function_call("ask", {"input": "?"}, call_id="outer")],
            [assistant_message("Done")],
            tools=[inner.as_tool("ask", "Ask.")],
        )
    )
    [interrupt] = mapped.events[-1]["outcome"]["interrupts"]
    assert interrupt["toolCallId"] == "inner"
    assert interrupt["metadata"] == {"toolName": "refund", "arguments": '{"order":7}'}


async def test_calls_that_wait_join_the_messages_as_far_as_they_may_be_seen() -> None:
    mapped = await run(agent(*APPROVAL_RUN, tools=[refund, add]))
    asked = interrupts(mapped.result.interruptions)
    for options, calls in ((FULL, 1), (NONE, 0)):
        messages = add_pending_calls([], asked, options)
        assert len(messages) == calls
