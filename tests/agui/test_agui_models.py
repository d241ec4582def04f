"""The SDK's real OpenAI models against a real HTTP server that streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    function_tool,
)

from agent_sessions.agui import StreamOptions
from tests.support.agui_provider import Provider, model, serving
from tests.support.agui_runs import FULL, run

MESSAGE_ID = "msg_0a1b2c3d4e5f60718293a4b5"
CALL_ID = "call_0a1b2c3d4e5f60718293a4b5"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with serving() as provider:
        yield provider


@function_tool
def add(a: int, b: int) -> str:
    """Add."""
    return str(a + b)


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def chat_usage() -> dict[str, Any]:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    return {**chunk(), "choices": [], "usage": usage}


def tool_delta(index: int, **keys: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **keys}]}


async def test_chat_completions_stream_as_they_come(provider: Provider) -> None:
    first = [
        chunk(role="assistant", content=""),
        chunk(reasoning_content="I "),
        chunk(reasoning_content="think"),
        chunk(content="Let me "),
        chunk(content="see"),
        chunk(
            **tool_delta(
                0,
                id=CALL_ID,
                type="function",
                function={"name": "add", "arguments": ""},
            )
        ),
        chunk(**tool_delta(0, function={"arguments": '{"a":1,'})),
        chunk(**tool_delta(0, function={"arguments": '"b":2}'})),
        chunk(
            **tool_delta(
                1,
                id="call_2",
                type="function",
                function={"name": "add", "arguments": '{"a":3,"b":4}'},
            )
        ),
        chunk("tool_calls"),
        chat_usage(),
    ]
    second = [chunk(content="3 "), chunk(content="and 7"), chunk("stop"), chat_usage()]
    async with model(OpenAIChatCompletionsModel, provider, first, second) as made:
        mapped = await run(Agent(name="A", model=made, tools=[add]))
    assert mapped.text() == "Let me see3 and 7"
    assert [event["delta"] for event in mapped.of("TEXT_MESSAGE_CONTENT")] == [
        "Let me ",
        "see",
        "3 ",
        "and 7",
    ]
    starts = mapped.of("TEXT_MESSAGE_START", "REASONING_START")
    assert [event["messageId"] for event in starts] == ["r-1/1", "r-1/2", "r-1/3"]
    assert [event["delta"] for event in mapped.of("REASONING_MESSAGE_CONTENT")] == [
        "I ",
        "think",
    ]
    parts: dict[str, str] = {}
    for event in mapped.of("TOOL_CALL_ARGS"):
        call = event["toolCallId"]
        parts[call] = parts.get(call, "") + event["delta"]
    assert parts == {CALL_ID: '{"a":1,"b":2}', "call_2": '{"a":3,"b":4}'}
    assert [event["content"] for event in mapped.of("TOOL_CALL_RESULT")] == ["3", "7"]
    assert mapped.events[-1]["usage"][0]["totalTokens"] == 20
    assert len({message["id"] for message in mapped.messages}) == len(mapped.messages)
    roles = [message["role"] for message in mapped.messages]
    assert roles.count("assistant") == 4


@pytest.mark.parametrize("expose", ["full", "names", "none"])
async def test_chat_completions_that_only_call_a_tool(
    provider: Provider, expose: Any
) -> None:
    function = {"name": "add", "arguments": '{"a":1,"b":2}'}
    first = [
        chunk(**tool_delta(0, id=CALL_ID, type="function", function=function)),
        chunk("tool_calls"),
    ]
    second = [chunk(content="3"), chunk("stop")]
    options = StreamOptions(expose_tools=expose)
    async with model(OpenAIChatCompletionsModel, provider, first, second) as made:
        mapped = await run(Agent(name="A", model=made, tools=[add]), options=options)
    shown = 0 if expose == "none" else 1
    assert len(mapped.of("TOOL_CALL_START")) == shown
    assert len(mapped.of("TOOL_CALL_END")) == shown
    assert len(mapped.of("TOOL_CALL_RESULT")) == shown
    assert len(mapped.of("TOOL_CALL_ARGS")) == (1 if expose == "full" else 0)
    assert "usage" not in mapped.events[-1]


async def test_chat_completions_refusal(provider: Provider) -> None:
    stream = [chunk(refusal="I "), chunk(refusal="can't"), chunk("stop")]
    async with model(OpenAIChatCompletionsModel, provider, stream) as made:
        mapped = await run(Agent(name="A", model=made))
    assert mapped.text() == "I can't"
    assert all(
        event["metadata"] == {"refusal": True}
        for event in mapped.of("TEXT_MESSAGE_CONTENT")
    )


async def test_chat_completions_plain_reasoning(provider: Provider) -> None:
    stream = [
        chunk(reasoning="Hm "),
        chunk(reasoning="m"),
        chunk(content="Yes"),
        chunk("stop"),
    ]
    async with model(OpenAIChatCompletionsModel, provider, stream) as made:
        mapped = await run(Agent(name="A", model=made))
    contents = mapped.of("REASONING_MESSAGE_CONTENT")
    assert [event["delta"] for event in contents] == ["Hm ", "m"]
    assert mapped.text() == "Yes"


async def test_chat_completions_that_break_off(provider: Provider) -> None:
    error = {"error": {"message": "the provider's inner words", "code": "x"}}
    stream = [chunk(content="Hel"), error]
    async with model(OpenAIChatCompletionsModel, provider, stream) as made:
        mapped = await run(Agent(name="A", model=made))
    assert mapped.text() == "Hel"
    assert mapped.kinds[-3:] == ["TEXT_MESSAGE_END", "STEP_FINISHED", "RUN_ERROR"]
    assert "inner words" not in json.dumps(mapped.events)


def response(status: str, *output: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 1},
            "total_tokens": 8,
        }
        if status == "completed"
        else None,
    }


def responses_stream(*items: tuple[dict[str, Any], list[dict[str, Any]]]) -> list[Any]:
    """Stream items, each with the events between its being added and done."""
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response("in_progress")},
        {"type": "response.in_progress", "response": response("in_progress")},
    ]
    for index, (item, between) in enumerate(items):
        empty: dict[str, Any] = {
            "content": [],
            "summary": [],
            "arguments": "",
            "output": None,
        }
        start = {key: empty.get(key, value) for key, value in item.items()}
        events.append({"type": "response.output_item.added", "item": start})
        events[-1]["output_index"] = index
        events += [
            {"item_id": item["id"], "output_index": index, **event} for event in between
        ]
        events.append({"type": "response.output_item.done", "item": item})
        events[-1]["output_index"] = index
    final = response("completed", *(item for item, _ in items))
    events.append({"type": "response.completed", "response": final})
    return [{**event, "sequence_number": n} for n, event in enumerate(events)]


def text_item(*deltas: str, item_id: str = MESSAGE_ID) -> Any:
    part = {"type": "output_text", "text": "".join(deltas), "annotations": []}
    item = {
        "type": "message",
        "id": item_id,
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    return item, [
        {
            "type": "response.output_text.delta",
            "content_index": 0,
            "delta": delta,
            "logprobs": [],
        }
        for delta in deltas
    ]


def call_item(*deltas: str) -> Any:
    item = {
        "type": "function_call",
        "id": "fc_1",
        "call_id": CALL_ID,
        "name": "add",
        "arguments": "".join(deltas),
        "status": "completed",
    }
    return item, [
        {"type": "response.function_call_arguments.delta", "delta": delta}
        for delta in deltas
    ]


def reasoning_item(*parts: tuple[str, ...]) -> Any:
    item = {
        "type": "reasoning",
        "id": "rs_0a1b2c3d4e5f60718293a4b5",
        "summary": [{"type": "summary_text", "text": "".join(part)} for part in parts],
        "encrypted_content": "SECRET",
    }
    return item, [
        {
            "type": "response.reasoning_summary_text.delta",
            "summary_index": index,
            "delta": delta,
        }
        for index, part in enumerate(parts)
        for delta in part
    ]


def web_search_item() -> Any:
    item = {
        "type": "web_search_call",
        "id": "ws_0a1b2c3d4e5f60718293a4b5",
        "status": "completed",
        "action": {"type": "search", "query": "django"},
    }
    return item, [
        {"type": "response.web_search_call.in_progress"},
        {"type": "response.web_search_call.searching"},
        {"type": "response.web_search_call.completed"},
    ]


async def test_responses_stream_as_they_come(provider: Provider) -> None:
    first = responses_stream(
        reasoning_item(("I ", "think"), ("Then",)),
        web_search_item(),
        text_item("Let me ", "see"),
        call_item('{"a":1,', '"b":2}'),
    )
    second = responses_stream(text_item("3", item_id="msg_ffffffffffffffff00000001"))
    async with model(OpenAIResponsesModel, provider, first, second) as made:
        mapped = await run(Agent(name="A", model=made, tools=[add]))
    assert mapped.kinds == [
        "RUN_STARTED",
        "STEP_STARTED",
        "REASONING_START",
        "REASONING_MESSAGE_START",
        *["REASONING_MESSAGE_CONTENT"] * 4,
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "TOOL_CALL_START",
        "TOOL_CALL_ARGS",
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
        "TEXT_MESSAGE_START",
        *["TEXT_MESSAGE_CONTENT"] * 2,
        "TEXT_MESSAGE_END",
        "TOOL_CALL_START",
        *["TOOL_CALL_ARGS"] * 2,
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "STEP_FINISHED",
        "RUN_FINISHED",
    ]
    contents = mapped.of("REASONING_MESSAGE_CONTENT")
    text = "".join(event["delta"] for event in contents)
    assert text == "I think\n\nThen" == mapped.messages[1]["content"]
    streamed = [
        event.get("messageId") or event["toolCallId"]
        for event in mapped.of(
            "REASONING_START", "TEXT_MESSAGE_START", "TOOL_CALL_START"
        )
    ]
    shot = [message["id"] for message in mapped.messages if message["role"] != "tool"]
    assert shot[1:] == streamed
    assert "SECRET" not in json.dumps(mapped.events + mapped.messages)
    assert mapped.events[-1]["usage"] == [
        {
            "inputTokens": 10,
            "outputTokens": 6,
            "totalTokens": 16,
            "reasoningTokens": 2,
            "cachedInputTokens": 8,
        }
    ]


async def test_a_failed_response_is_an_error_that_leaves_nothing_open(
    provider: Provider,
) -> None:
    stream = responses_stream(text_item("Hel", "lo"))[:4]
    failed = response("failed")
    failed["error"] = {"code": "server_error", "message": "the provider's inner words"}
    stream.append({"type": "response.failed", "response": failed, "sequence_number": 9})
    async with model(OpenAIResponsesModel, provider, stream) as made:
        mapped = await run(Agent(name="A", model=made), options=FULL)
    assert mapped.text() == "Hel"
    assert mapped.kinds[-3:] == ["TEXT_MESSAGE_END", "STEP_FINISHED", "RUN_ERROR"]


async def test_a_stream_that_ends_too_early_is_an_error(provider: Provider) -> None:
    stream = responses_stream(text_item("Hel", "lo"))[:4]
    async with model(OpenAIResponsesModel, provider, stream) as made:
        mapped = await run(Agent(name="A", model=made))
    assert mapped.kinds[-3:] == ["TEXT_MESSAGE_END", "STEP_FINISHED", "RUN_ERROR"]
