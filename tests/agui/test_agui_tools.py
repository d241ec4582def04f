"""Tool calls, hosted tools and handoffs in the stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from agents import (
    RunItemStreamEvent,
    Runner,
    handoff,
)
from agents.items import ToolCallItem, ToolCallOutputItem
from agents.testing import assistant_message, function_call
from openai.types.responses import (
    ResponseFunctionWebSearch,
)
from openai.types.responses.response_output_item import McpCall, Program, ProgramOutput

from agent_sessions.agui import (
    EventMapper,
    StreamOptions,
)
from agent_sessions.agui.content import cut
from tests.support.agui_runs import FULL, run
from tests.support.agui_samples import (
    NAMES,
    NONE,
    add,
    added,
    agent,
    completed,
    created,
    done,
    raw,
    shout,
)
from tests.support.agui_validator import SequenceChecker

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
        item = McpCall.model_validate({**call, "output": None, "error": None})
        item = item.model_copy(update=end)
        outputs.append(hosted(FULL, item)[-1]["content"])
    assert outputs == ["42", "down", '{"type": "x"}', ""]


def test_a_model_s_own_output_item_is_a_result() -> None:
    program = Program(
        id="p_1", type="program", call_id="call_1", code="1+1", fingerprint="f"
    )
    result = ProgramOutput(
        id="p_2",
        type="program_output",
        call_id="call_1",
        result="2",
        status="completed",
    )
    assert hosted(FULL, program)[1]["delta"] == '{"code": "1+1"}'
    [event] = hosted(FULL, result)
    assert event["toolCallId"] == "call_1"
    assert event["content"] == "2"


def test_a_call_without_an_id_is_passed_over() -> None:
    nameless = function_call("add", "{}", call_id="", item_id="")
    assert hosted(FULL, nameless) == []
    mapper = EventMapper(thread_id="t", run_id="r", options=FULL)
    owner = agent()
    item = ToolCallItem(agent=owner, raw_item={"type": "function_call"})
    event = RunItemStreamEvent(item=item, name="tool_called")
    assert mapper.map(event) == []
    unknown = RunItemStreamEvent(item=item, name="mcp_list_tools")
    assert mapper.map(unknown) == []


def test_an_output_is_shown_once_and_not_at_all_if_tools_are_hidden() -> None:
    result = {"type": "function_call_output", "call_id": "call_1", "output": "3"}
    owner = agent()
    item = ToolCallOutputItem(agent=owner, raw_item=result, output="3")
    event = RunItemStreamEvent(item=item, name="tool_output")
    for options, results in ((FULL, 1), (NAMES, 1), (NONE, 0)):
        mapper = EventMapper(thread_id="t", run_id="r", options=options)
        assert len(mapper.map(event) + mapper.map(event)) == results
