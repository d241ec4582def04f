"""The stream of real runs, as AG-UI events."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from agents import (
    Agent,
    MaxTurnsExceeded,
    RawResponsesStreamEvent,
    Runner,
    RunState,
    Usage,
    function_tool,
    handoff,
)
from agents.exceptions import ModelBehaviorError
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseFunctionToolCall,
    ResponseFunctionWebSearch,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseReasoningItem,
    ResponseTextDeltaEvent,
)
from openai.types.responses.response_output_item import McpCall
from openai.types.responses.response_reasoning_item import Content, Summary

from agent_sessions.agui import (
    EventMapper,
    StreamOptions,
    idle_sync,
    interrupts,
    messages_from_items,
    run_error,
    snapshot,
    token_usage,
)
from agent_sessions.agui.content import cut
from agent_sessions.agui.lifecycle import PROTOCOL_VERSION
from tests.agui_runs import FULL, Mapped, run, stored
from tests.agui_validator import SequenceChecker, validate_event

REAL_ID = "msg_67ccd2bf17f0819081ff3bb2cf6508e6"
NAMES = StreamOptions()
NONE = StreamOptions(expose_tools="none")


@function_tool
def add(a: int, b: int) -> str:
    """Add."""
    return str(a + b)


@function_tool
def shout(text: str) -> str:
    """Answer at length."""
    return text * 20_000


@function_tool(needs_approval=True)
def refund(order: int) -> str:
    """Refund an order."""
    return f"refunded {order}"


@function_tool(failure_error_function=None)
def explode() -> str:
    """Fail."""
    raise RuntimeError("the secret reason")


def agent(*steps: Any, name: str = "Support", **settings: Any) -> Agent[Any]:
    return Agent(name=name, model=ScriptedModel(steps), **settings)


def reasoning(*summaries: str, text: str = "") -> ResponseReasoningItem:
    return ResponseReasoningItem(
        id="rs_1",
        type="reasoning",
        summary=[Summary(text=entry, type="summary_text") for entry in summaries],
        content=[Content(text=text, type="reasoning_text")] if text else None,
        encrypted_content="SECRET",
    )


def refusal(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id="msg_1",
        type="message",
        role="assistant",
        status="completed",
        content=[ResponseOutputRefusal(refusal=text, type="refusal")],
    )


def response(*output: Any) -> Response:
    return Response.model_construct(
        id="resp_1", output=list(output), usage=None, object="response", model="m"
    )


def completed(*output: Any) -> ResponseCompletedEvent:
    return ResponseCompletedEvent.model_construct(
        type="response.completed", response=response(*output), sequence_number=9
    )


def created() -> ResponseCreatedEvent:
    return ResponseCreatedEvent.model_construct(
        type="response.created", response=response(), sequence_number=0
    )


def added(item: Any, index: int = 0) -> ResponseOutputItemAddedEvent:
    return ResponseOutputItemAddedEvent.model_construct(
        type="response.output_item.added",
        item=item,
        output_index=index,
        sequence_number=1,
    )


def done(item: Any, index: int = 0) -> ResponseOutputItemDoneEvent:
    return ResponseOutputItemDoneEvent.model_construct(
        type="response.output_item.done",
        item=item,
        output_index=index,
        sequence_number=3,
    )


def delta(text: str, item_id: str = "msg_1", index: int = 0) -> ResponseTextDeltaEvent:
    return ResponseTextDeltaEvent.model_construct(
        type="response.output_text.delta",
        delta=text,
        item_id=item_id,
        output_index=index,
        content_index=0,
        logprobs=[],
        sequence_number=2,
    )


def streamed(*events: Any) -> ModelStep:
    return ModelStep.stream(events)


def raw(mapper: EventMapper, *events: Any) -> list[dict[str, Any]]:
    return [
        made
        for event in events
        for made in mapper.map(RawResponsesStreamEvent(data=event))
    ]


async def test_a_text_answer_opens_fills_and_closes_one_message() -> None:
    mapped = await run(agent([assistant_message("Hello Alice", item_id=REAL_ID)]))
    assert mapped.events == [
        {
            "type": "RUN_STARTED",
            "threadId": "t-1",
            "runId": "r-1",
            "protocolVersion": "1.0",
            "input": {
                "threadId": "t-1",
                "runId": "r-1",
                "state": {},
                "messages": [{"id": "u-1", "role": "user", "content": "Hello"}],
                "tools": [],
                "context": [],
                "forwardedProps": {},
            },
        },
        {"type": "STEP_STARTED", "stepName": "Support"},
        {
            "type": "TEXT_MESSAGE_START",
            "messageId": REAL_ID,
            "role": "assistant",
            "name": "Support",
        },
        {
            "type": "TEXT_MESSAGE_CONTENT",
            "messageId": REAL_ID,
            "delta": "Hello Alice",
        },
        {"type": "TEXT_MESSAGE_END", "messageId": REAL_ID},
        {"type": "STEP_FINISHED", "stepName": "Support"},
        {
            "type": "RUN_FINISHED",
            "threadId": "t-1",
            "runId": "r-1",
            "outcome": {"type": "success"},
        },
    ]


async def test_a_real_id_is_the_same_in_the_stream_and_in_the_snapshot() -> None:
    mapped = await run(agent([assistant_message("Hi", item_id=REAL_ID)]))
    assert mapped.of("TEXT_MESSAGE_START")[0]["messageId"] == REAL_ID
    assert mapped.messages[-1] == {
        "id": REAL_ID,
        "role": "assistant",
        "content": "Hi",
    }


async def test_ids_that_models_make_up_never_repeat_in_a_run() -> None:
    mapped = await run(
        agent(
            [
                assistant_message("One"),
                function_call("add", {"a": 1, "b": 2}, call_id="c"),
            ],
            [assistant_message("Two"), assistant_message("Three")],
            tools=[add],
        )
    )
    ids = [event["messageId"] for event in mapped.of("TEXT_MESSAGE_START")]
    assert ids == ["r-1/1", "r-1/2", "r-1/3"]
    assert mapped.text() == "OneTwoThree"
    ids = [message["id"] for message in mapped.messages]
    assert ids == ["item-0", "item-1", "c", "c:result", "item-4", "item-5"]


async def test_a_real_id_given_twice_is_used_once() -> None:
    same = [assistant_message(text, item_id=REAL_ID) for text in ("One", "Two")]
    mapped = await run(agent(same))
    ids = [event["messageId"] for event in mapped.of("TEXT_MESSAGE_START")]
    assert ids == [REAL_ID, "r-1/2"]
    assert [message["id"] for message in mapped.messages[1:]] == [REAL_ID, "item-2"]


TOOL_RUN = (
    [function_call("add", {"a": 1, "b": 2}, call_id="call_1")],
    [assistant_message("3")],
)


async def test_full_exposure_shows_arguments_and_output() -> None:
    mapped = await run(agent(*TOOL_RUN, tools=[add]), options=FULL)
    assert mapped.events[2:6] == [
        {"type": "TOOL_CALL_START", "toolCallId": "call_1", "toolCallName": "add"},
        {"type": "TOOL_CALL_ARGS", "toolCallId": "call_1", "delta": '{"a":1,"b":2}'},
        {"type": "TOOL_CALL_END", "toolCallId": "call_1"},
        {
            "type": "TOOL_CALL_RESULT",
            "messageId": "call_1:result",
            "toolCallId": "call_1",
            "role": "tool",
            "content": "3",
        },
    ]


async def test_names_show_that_a_tool_ran_but_not_with_what() -> None:
    mapped = await run(agent(*TOOL_RUN, tools=[add]), options=NAMES)
    assert mapped.events[2:5] == [
        {"type": "TOOL_CALL_START", "toolCallId": "call_1", "toolCallName": "add"},
        {"type": "TOOL_CALL_END", "toolCallId": "call_1"},
        {
            "type": "TOOL_CALL_RESULT",
            "messageId": "call_1:result",
            "toolCallId": "call_1",
            "role": "tool",
            "content": "",
            "metadata": {"withheld": True},
        },
    ]
    assert '"a"' not in json.dumps(mapped.messages)


async def test_no_exposure_shows_no_trace_of_a_tool() -> None:
    mapped = await run(agent(*TOOL_RUN, tools=[add]), options=NONE)
    assert not [kind for kind in mapped.kinds if kind.startswith("TOOL")]
    assert [message["role"] for message in mapped.messages] == ["user", "assistant"]


async def test_a_long_output_is_cut_with_a_marker() -> None:
    mapped = await run(
        agent(
            [function_call("shout", {"text": "é"}, call_id="call_1")],
            [assistant_message("Done")],
            tools=[shout],
        )
    )
    result = mapped.of("TOOL_CALL_RESULT")[0]
    assert result["metadata"] == {"truncated": True}
    assert result["content"].endswith("\n[cut: 16384 of 40000 bytes shown]")
    assert 16_300 < len(result["content"].encode()) <= 16_384
    assert mapped.messages[2]["content"] == result["content"]
    assert mapped.messages[2]["metadata"] == {"truncated": True}


@pytest.mark.parametrize("limit", [0, 1, 30, 40, 41, 42, 43, 44])
def test_a_cut_keeps_whole_characters(limit: int) -> None:
    text, was_cut = cut("a€" * 100, limit)
    assert was_cut
    assert "\ufffd" not in text
    assert text.encode().decode() == text


def test_a_text_of_just_the_limit_is_whole() -> None:
    assert cut("€" * 4, 12) == ("€" * 4, False)


async def test_a_handoff_is_an_event_and_a_step_and_no_tool_call() -> None:
    billing = agent([assistant_message("Billing here")], name="Billing")
    mapped = await run(
        agent(
            [function_call("transfer_to_billing", {}, call_id="h_1")],
            handoffs=[billing],
        )
    )
    assert mapped.events[1:5] == [
        {"type": "STEP_STARTED", "stepName": "Support"},
        {
            "type": "CUSTOM",
            "name": "agent_sessions:handoff",
            "value": {"from": "Support", "to": "Billing"},
        },
        {"type": "STEP_FINISHED", "stepName": "Support"},
        {"type": "STEP_STARTED", "stepName": "Billing"},
    ]
    assert mapped.of("TEXT_MESSAGE_START")[0]["name"] == "Billing"
    assert mapped.messages[1:] == [
        {
            "id": "item-2",
            "role": "activity",
            "activityType": "agent_sessions:handoff",
            "content": {"to": "Billing"},
        },
        {"id": "item-3", "role": "assistant", "content": "Billing here"},
    ]


async def test_a_handoff_of_another_name_is_known_too() -> None:
    billing = agent([assistant_message("Hi")], name="Billing")
    mapped = await run(
        agent(
            [function_call("escalate", {}, call_id="h_1")],
            handoffs=[handoff(billing, tool_name_override="escalate")],
        )
    )
    assert not mapped.of("TOOL_CALL_START")
    assert len(mapped.of("CUSTOM")) == 1


async def test_of_two_handoffs_at_once_the_refused_one_stays_unseen() -> None:
    billing = agent([assistant_message("Hi")], name="Billing")
    sales = agent(name="Sales")
    mapped = await run(
        agent(
            [
                function_call("transfer_to_billing", {}, call_id="h_1"),
                function_call("transfer_to_sales", {}, call_id="h_2"),
            ],
            handoffs=[billing, sales],
        )
    )
    assert not [kind for kind in mapped.kinds if kind.startswith("TOOL")]
    assert [event["value"]["to"] for event in mapped.of("CUSTOM")] == ["Billing"]


async def test_a_handoff_that_was_announced_as_a_tool_is_answered() -> None:
    billing = agent([assistant_message("Hi")], name="Billing")
    support = agent(
        [function_call("transfer_to_billing", {}, call_id="h_1")], handoffs=[billing]
    )
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    async for event in Runner.run_streamed(support, "Hi").stream_events():
        checker.feed_all(mapper.map(event))
        # As if the handoff had not been there when the agent began.
        mapper._items.handoff_tools = frozenset()
    checker.feed_all(mapper.finished())
    calls = [event for event in checker.events if "toolCallId" in event]
    assert [event["type"] for event in calls] == [
        "TOOL_CALL_START",
        "TOOL_CALL_ARGS",
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
    ]


async def test_a_tool_that_looks_like_a_handoff_is_shown_after_all() -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    mapper._items.handoff_tools = frozenset({"add"})
    checker = SequenceChecker()
    checker.feed(mapper.started())
    mapped = await run(agent(*TOOL_RUN, tools=[add]))
    assert mapped.of("TOOL_CALL_START")
    async for event in Runner.run_streamed(
        agent(*TOOL_RUN, tools=[add]), "Hi"
    ).stream_events():
        if event.type != "agent_updated_stream_event":
            checker.feed_all(mapper.map(event))
    checker.feed_all(mapper.finished())
    calls = [event for event in checker.events if "toolCallId" in event]
    assert [event["type"] for event in calls] == [
        "TOOL_CALL_START",
        "TOOL_CALL_ARGS",
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
    ]


async def test_an_agent_as_a_tool_shows_its_call_and_not_its_run() -> None:
    expert = agent(
        [function_call("add", {"a": 1, "b": 1}, call_id="inner")],
        [assistant_message("The inner words")],
        name="Expert",
        tools=[add],
    )
    mapped = await run(
        agent(
            [function_call("ask", {"input": "?"}, call_id="outer")],
            [assistant_message("The outer words")],
            tools=[expert.as_tool("ask", "Ask.")],
        )
    )
    assert mapped.text() == "The outer words"
    assert [event["toolCallId"] for event in mapped.of("TOOL_CALL_START")] == ["outer"]
    assert [event["stepName"] for event in mapped.of("STEP_STARTED")] == ["Support"]
    assert mapped.of("TOOL_CALL_RESULT")[0]["content"] == "The inner words"


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
    assert mapped.events[-1]["outcome"] == {
        "type": "interrupt",
        "interrupts": [
            {
                "id": "call_1",
                "reason": "tool_call",
                "toolCallId": "call_1",
                "responseSchema": {
                    "type": "object",
                    "properties": {
                        "approved": {"type": "boolean"},
                        "reason": {"type": "string"},
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
    items = mapped.result.interruptions
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


async def test_reasoning_is_not_shown_by_default() -> None:
    mapped = await run(
        agent([reasoning("I think"), assistant_message("Yes")]), options=NAMES
    )
    assert not [kind for kind in mapped.kinds if kind.startswith("REASONING")]
    assert "think" not in json.dumps(mapped.events + mapped.messages)


async def test_reasoning_shows_its_summary_and_never_what_is_encrypted() -> None:
    mapped = await run(
        agent(
            [reasoning("First", "Second", text="The whole"), assistant_message("Yes")]
        )
    )
    kinds = [kind for kind in mapped.kinds if kind.startswith("REASONING")]
    assert kinds == [
        "REASONING_START",
        "REASONING_MESSAGE_START",
        *["REASONING_MESSAGE_CONTENT"] * 3,
        "REASONING_MESSAGE_END",
        "REASONING_END",
    ]
    contents = mapped.of("REASONING_MESSAGE_CONTENT")
    text = "".join(event["delta"] for event in contents)
    assert text == "First\n\nSecond" == mapped.messages[1]["content"]
    assert "SECRET" not in json.dumps(mapped.events + mapped.messages)


async def test_reasoning_without_a_summary_shows_its_text() -> None:
    mapped = await run(agent([reasoning(text="Hm"), assistant_message("Yes")]))
    assert mapped.of("REASONING_MESSAGE_CONTENT")[0]["delta"] == "Hm"
    assert mapped.messages[1]["content"] == "Hm"


async def test_reasoning_without_words_shows_nothing() -> None:
    mapped = await run(agent([reasoning(), assistant_message("Yes")]))
    assert not [kind for kind in mapped.kinds if kind.startswith("REASONING")]
    assert [message["role"] for message in mapped.messages] == ["user", "assistant"]


async def test_a_refusal_is_text_that_says_so() -> None:
    mapped = await run(agent([refusal("I can't")]))
    [content] = mapped.of("TEXT_MESSAGE_CONTENT")
    assert content["delta"] == "I can't"
    assert content["metadata"] == {"refusal": True}
    # The SDK ends a refused run with ModelRefusalError.
    assert mapped.events[-1]["message"] == "ModelRefusalError"


async def test_an_answer_without_deltas_gives_its_text() -> None:
    message = assistant_message("All at once")
    mapped = await run(agent(streamed(completed(message))))
    assert mapped.text() == "All at once"
    assert len(mapped.of("TEXT_MESSAGE_START")) == 1


async def test_a_refusal_without_deltas_gives_its_text() -> None:
    mapper = EventMapper(thread_id="t", run_id="r")
    [_, content, _] = raw(mapper, created(), done(refusal("No")))
    assert content["metadata"] == {"refusal": True}


async def test_items_without_deltas_are_shown_whole() -> None:
    call = ResponseFunctionToolCall(
        type="function_call", call_id="call_1", name="add", arguments='{"a":1,"b":2}'
    )
    mapped = await run(
        agent(
            streamed(completed(reasoning("Hm"), call)),
            streamed(completed(assistant_message("3"))),
            tools=[add],
        )
    )
    assert mapped.kinds[2:-2] == [
        "REASONING_START",
        "REASONING_MESSAGE_START",
        "REASONING_MESSAGE_CONTENT",
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "TOOL_CALL_START",
        "TOOL_CALL_ARGS",
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
    ]


async def test_deltas_without_announcement_are_shown_once() -> None:
    message = assistant_message("Hello", item_id="msg_1")
    mapped = await run(
        agent(streamed(created(), delta("Hel"), delta("lo"), completed(message)))
    )
    assert mapped.text() == "Hello"
    assert len(mapped.of("TEXT_MESSAGE_START")) == 1


async def test_item_ids_that_change_from_delta_to_delta_do_not_matter() -> None:
    message = assistant_message("Hello", item_id="msg_9")
    mapped = await run(
        agent(
            streamed(
                created(),
                added(assistant_message("", item_id="msg_0")),
                delta("Hel", "msg_1"),
                delta("lo", "msg_2"),
                done(message),
                completed(message),
            )
        )
    )
    assert mapped.text() == "Hello"
    assert len(mapped.of("TEXT_MESSAGE_START")) == 1


def test_a_response_that_begins_anew_ends_the_one_before() -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    message = assistant_message("x", item_id=REAL_ID)
    checker.feed_all(raw(mapper, created(), added(message), delta("Hel")))
    checker.feed_all(raw(mapper, created(), added(message), delta("Hello")))
    checker.feed_all(raw(mapper, done(message), completed(message)))
    checker.feed_all(mapper.finished())
    checker.finish()


def test_a_call_id_open_twice_is_ended_first() -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    call = function_call("add", "{}", call_id="call_0")
    checker.feed_all(raw(mapper, created(), added(call, 0), added(call, 1)))
    checker.feed_all(raw(mapper, done(call, 0), done(call, 1)))
    checker.feed_all(mapper.finished())
    checker.finish()


def hosted(options: StreamOptions, item: Any) -> list[dict[str, Any]]:
    mapper = EventMapper(thread_id="t", run_id="r", options=options)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    checker.feed_all(raw(mapper, created(), added(item), done(item), completed(item)))
    checker.feed_all(mapper.finished())
    checker.finish()
    return checker.events[1:-1]


WEB_SEARCH = ResponseFunctionWebSearch.model_validate(
    {
        "id": "ws_1",
        "type": "web_search_call",
        "status": "completed",
        "action": {
            "type": "search",
            "query": "django",
            "sources": [{"type": "url", "url": "https://www.djangoproject.com/"}],
        },
    }
)


def test_a_hosted_tool_has_its_result_when_it_is_done() -> None:
    assert hosted(FULL, WEB_SEARCH) == [
        {
            "type": "TOOL_CALL_START",
            "toolCallId": "ws_1",
            "toolCallName": "web_search",
        },
        {
            "type": "TOOL_CALL_ARGS",
            "toolCallId": "ws_1",
            "delta": '{"query": "django"}',
        },
        {"type": "TOOL_CALL_END", "toolCallId": "ws_1"},
        {
            "type": "TOOL_CALL_RESULT",
            "messageId": "ws_1:result",
            "toolCallId": "ws_1",
            "role": "tool",
            "content": "https://www.djangoproject.com/",
        },
    ]
    assert "django" not in json.dumps(hosted(NAMES, WEB_SEARCH))
    assert hosted(NONE, WEB_SEARCH) == []


def test_an_mcp_call_shows_its_output_or_its_error() -> None:
    call = {
        "id": "mcp_1",
        "type": "mcp_call",
        "name": "ask",
        "server_label": "wiki",
        "arguments": "{}",
    }
    outputs = []
    for end in ({"output": "42"}, {"error": "down"}, {"error": {"type": "x"}}, {}):
        item = McpCall.model_construct(**call, **end)
        outputs.append(hosted(FULL, item)[-1]["content"])
    assert outputs == ["42", "down", '{"type": "x"}', ""]


async def test_a_failing_tool_closes_everything_before_the_error() -> None:
    mapped = await run(
        agent([function_call("explode", {}, call_id="call_1")], tools=[explode])
    )
    assert mapped.events[-1] == {
        "type": "RUN_ERROR",
        "code": "internal",
        "message": "UserError",
        "metadata": {"runId": "r-1"},
    }
    assert "secret" not in json.dumps(mapped.events)


@pytest.mark.parametrize(
    "events",
    [
        [created(), added(assistant_message("x")), delta("Hel")],
        [created(), added(function_call("add", "{}", call_id="c"))],
        [created(), added(reasoning("x"))],
        [],
    ],
)
async def test_a_model_that_breaks_off_leaves_nothing_open(events: list[Any]) -> None:
    async def broken(call: Any) -> Any:
        for event in events:
            yield event
        raise ModelBehaviorError("broken")

    mapped = await run(agent(ModelStep.stream(broken), tools=[add]))
    assert mapped.kinds[-2:] == ["STEP_FINISHED", "RUN_ERROR"]


async def test_too_many_turns_is_an_error() -> None:
    steps = [
        [function_call("add", {"a": 1, "b": 2}, call_id=f"c{n}")] for n in range(3)
    ]
    mapped = await run(agent(*steps, tools=[add]), max_turns=2)
    assert mapped.events[-1]["message"] == MaxTurnsExceeded.__name__


async def test_a_final_output_made_by_an_error_handler_is_shown() -> None:
    mapped = await run(
        agent([function_call("add", {"a": 1, "b": 2}, call_id="c")], tools=[add]),
        max_turns=1,
        error_handlers={"max_turns": lambda data: "Sorry, too long"},
    )
    assert mapped.text() == "Sorry, too long"
    assert mapped.events[-1]["outcome"] == {"type": "success"}


@pytest.mark.parametrize("mode", ["immediate", "after_turn"])
async def test_a_cancelled_run_is_closed_as_such(mode: Any) -> None:
    def stop(result: Any, event: dict[str, Any]) -> None:
        if event["type"] == "TEXT_MESSAGE_CONTENT":
            result.cancel(mode=mode)

    mapped = await run(
        agent(
            [
                assistant_message("One"),
                function_call("add", {"a": 1, "b": 2}, call_id="c"),
            ],
            [assistant_message("Two")],
            tools=[add],
        ),
        act=stop,
    )
    assert mapped.text() == "One"
    assert mapped.events[-1]["outcome"] == {"type": "cancelled"}


def test_after_the_end_nothing_comes_any_more() -> None:
    for end in (EventMapper.finished, lambda m: m.error("internal", "Failed")):
        mapper = EventMapper(thread_id="t", run_id="r")
        assert end(mapper)
        assert raw(mapper, created(), delta("late")) == []
        assert mapper.finished() == []
        assert mapper.error("internal", "Failed") == []


async def test_usage_is_counted_over_the_run() -> None:
    usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
    usage.output_tokens_details.reasoning_tokens = 2
    usage.input_tokens_details.cached_tokens = 4
    step = ModelStep(output=[assistant_message("Hi")], usage=usage)
    mapped = await run(agent(step))
    assert mapped.events[-1]["usage"] == [
        {
            "inputTokens": 10,
            "outputTokens": 5,
            "totalTokens": 15,
            "reasoningTokens": 2,
            "cachedInputTokens": 4,
        }
    ]


def test_no_usage_is_left_out() -> None:
    assert token_usage(None) == token_usage(Usage()) == []
    mapper = EventMapper(thread_id="t", run_id="r")
    assert "usage" not in mapper.error("model_error", "Failed", Usage())[-1]


def test_a_refusal_of_a_frame_stands_alone() -> None:
    checker = SequenceChecker()
    checker.feed(run_error("session_busy", "Busy", run_id="r-2"))
    checker.feed(run_error("bad_request", "No"))
    assert "metadata" not in checker.events[-1]


async def test_an_idle_sync_is_a_run_of_its_own() -> None:
    checker = SequenceChecker()
    checker.feed_all(idle_sync("t", "sync:1", [], before="cursor"))
    assert checker.events[1]["metadata"] == {"before": "cursor"}
    mapped = await run(agent(*APPROVAL_RUN, tools=[refund, add]))
    asked = interrupts(mapped.result.interruptions)
    checker.feed_all(idle_sync("t", "sync:2", mapped.messages, open_interrupts=asked))
    assert checker.events[-1]["outcome"] == {"type": "interrupt", "interrupts": asked}


async def test_a_snapshot_of_a_run_equals_what_its_stream_built() -> None:
    call_id = "call_0123456789abcdefghij"
    mapped = await run(
        agent(
            [
                assistant_message("Let me see", item_id=REAL_ID),
                function_call("add", {"a": 1, "b": 2}, call_id=call_id),
            ],
            [assistant_message("3", item_id=REAL_ID.replace("6", "7"))],
            tools=[add],
        )
    )
    assert built(mapped) == mapped.messages[1:]


def built(mapped: Mapped) -> list[dict[str, Any]]:
    """Build messages from a stream as the official client does."""
    messages: dict[str, dict[str, Any]] = {}
    for event in mapped.events:
        kind = event["type"]
        if kind == "TEXT_MESSAGE_START":
            start = {"id": event["messageId"], "role": "assistant", "content": ""}
            messages[event["messageId"]] = start
        elif kind == "TEXT_MESSAGE_CONTENT":
            messages[event["messageId"]]["content"] += event["delta"]
        elif kind == "TOOL_CALL_START":
            function = {"name": event["toolCallName"], "arguments": ""}
            messages[event["toolCallId"]] = {
                "id": event["toolCallId"],
                "role": "assistant",
                "toolCalls": [
                    {
                        "id": event["toolCallId"],
                        "type": "function",
                        "function": function,
                    }
                ],
            }
        elif kind == "TOOL_CALL_ARGS":
            [call] = messages[event["toolCallId"]]["toolCalls"]
            call["function"]["arguments"] += event["delta"]
        elif kind == "TOOL_CALL_RESULT":
            messages[event["messageId"]] = {
                "id": event["messageId"],
                "role": "tool",
                "toolCallId": event["toolCallId"],
                "content": event["content"],
            }
    return list(messages.values())


def test_lone_surrogates_never_leave() -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    events = raw(mapper, created(), delta("a\ud83d"), delta("\ud83d\ude00"))
    assert [event.get("delta") for event in events[1:]] == ["a\ufffd", "😀"]


def test_the_protocol_version_is_the_package_s() -> None:
    from ag_ui.core import PROTOCOL_VERSION as expected

    assert expected == PROTOCOL_VERSION


def test_importing_the_package_loads_neither_sdk_nor_django() -> None:
    code = (
        "import sys, agent_sessions.agui; print([name for name in "
        "('agents', 'openai', 'ag_ui', 'channels', 'django') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


def test_a_snapshot_without_messages_is_legal() -> None:
    validate_event(snapshot([]))
    assert messages_from_items(stored([None])) == []
