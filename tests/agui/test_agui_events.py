"""Messages and reasoning in the stream of real runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from agents import RunItemStreamEvent
from agents.items import MessageOutputItem
from agents.testing import assistant_message, function_call
from openai.types.responses import (
    ResponseFunctionToolCall,
)

from agent_sessions.agui import (
    EventMapper,
)
from agent_sessions.agui.messages import own_id
from tests.support.agui_runs import FULL, Mapped, run
from tests.support.agui_samples import (
    NAMES,
    REAL_ID,
    add,
    added,
    agent,
    completed,
    created,
    delta,
    done,
    raw,
    reasoning,
    refusal,
    streamed,
)
from tests.support.agui_validator import SequenceChecker


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


def test_a_refusal_without_announcement_opens_its_message() -> None:
    mapper = EventMapper(thread_id="t", run_id="r")
    event = delta("No").model_copy(update={"type": "response.refusal.delta"})
    start, content = raw(mapper, created(), event)
    assert "metadata" not in start
    assert content["metadata"] == {"refusal": True}


@pytest.mark.parametrize(
    ("value", "unique"),
    [
        (REAL_ID, True),
        ("4c1f8a52-3d0f-4a33-9e37-7a3d3b0f5c11", True),
        ("__fake_id__", False),
        ("msg_1", False),
        ("scripted-message", False),
        ("a-name-that-is-long-and-has-no-number", False),
        ("a-name-that-is-long-and-has-1-number", False),
        (REAL_ID + "\n", False),
        (REAL_ID + "é", False),
        ("0" * 256, False),
        (None, False),
        (10**30, False),
    ],
)
def test_only_ids_made_at_random_are_used(value: Any, unique: bool) -> None:
    assert own_id(value) == (value if unique else None)


def test_what_streamed_once_hides_one_run_item_and_no_more() -> None:
    mapper = EventMapper(thread_id="t", run_id="r")
    message = assistant_message("Hi")
    raw(mapper, created(), added(message), delta("Hi"), done(message))
    owner = agent()
    item = MessageOutputItem(agent=owner, raw_item=message)  # type: ignore[arg-type]
    event = RunItemStreamEvent(item=item, name="message_output_created")
    assert [len(mapper.map(event)) for _ in range(2)] == [0, 3]
