"""Joining of deltas, and the legality of every mapped sequence."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from agents import RawResponsesStreamEvent, RunItemStreamEvent
from agents.testing import function_call
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions.agui import EventMapper, StreamOptions, merge
from tests.agui_runs import FULL
from tests.agui_validator import SequenceChecker
from tests.test_agui_events import (
    added,
    agent,
    assistant_message,
    completed,
    created,
    delta,
    done,
    reasoning,
    refusal,
)


def content(text: str, message: str = "m", **extra: Any) -> dict[str, Any]:
    event = {"type": "TEXT_MESSAGE_CONTENT", "messageId": message, "delta": text}
    return {**event, **extra}


def arguments(text: str, call: str = "m") -> dict[str, Any]:
    return {"type": "TOOL_CALL_ARGS", "toolCallId": call, "delta": text}


def test_neighbours_of_one_message_are_joined() -> None:
    events = [content("a"), content("b"), content("c")]
    before = copy.deepcopy(events)
    assert merge(events) == [content("abc")]
    assert events == before


def test_only_equal_neighbours_are_joined() -> None:
    refused = content("d", metadata={"refusal": True})
    events = [
        content("a"),
        content("b", "other"),
        arguments("c"),
        content("c", "other"),
        refused,
        content("e"),
        {"type": "STEP_STARTED", "stepName": "x"},
        content("f"),
        arguments("1"),
        arguments("2"),
        {"type": "TOOL_CALL_END", "toolCallId": "m"},
    ]
    assert merge(events) == [*events[:8], arguments("12"), events[-1]]
    assert merge([]) == []


ALL = [
    *(content(text, message) for text in "ab" for message in "mn"),
    *(arguments(text, call) for text in "ab" for call in "mn"),
    {"type": "TEXT_MESSAGE_END", "messageId": "m"},
]


@given(st.lists(st.sampled_from(ALL)))
def test_joining_changes_no_text_and_no_order(events: list[dict[str, Any]]) -> None:
    def spelled(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        letters = [
            (event["type"], event.get("messageId"), event.get("toolCallId"), letter)
            for event in events
            for letter in event.get("delta", ".")
        ]
        return letters

    merged = merge(events)
    assert spelled(merged) == spelled(events)
    for one, two in itertools.pairwise(merged):
        assert "delta" not in one or {**one, "delta": ""} != {**two, "delta": ""}


MESSAGE = assistant_message("Hello", item_id="msg_1")
CALL = function_call("add", "{}", call_id="c_1")
ITEMS = [MESSAGE, CALL, reasoning("Hm"), refusal("No")]
RAW = [
    created(),
    completed(MESSAGE),
    *(
        make(item, index)
        for make in (added, done)
        for item in ITEMS
        for index in (0, 1)
    ),
    *(delta(text, "msg_1", index) for text in ("", "x") for index in (0, 1)),
]


def run_items() -> list[RunItemStreamEvent]:
    from agents.items import MessageOutputItem, ReasoningItem, ToolCallItem

    owner = agent()
    OWNERS.append(owner)
    return [
        RunItemStreamEvent(
            item=MessageOutputItem(agent=owner, raw_item=MESSAGE),  # type: ignore[arg-type]
            name="message_output_created",
        ),
        RunItemStreamEvent(
            item=ReasoningItem(agent=owner, raw_item=reasoning("Hm")),
            name="reasoning_item_created",
        ),
        RunItemStreamEvent(
            item=ToolCallItem(agent=owner, raw_item=CALL), name="tool_called"
        ),
    ]


# Run items hold their agents weakly.
OWNERS: list[Any] = []
EVENTS = [*(RawResponsesStreamEvent(data=event) for event in RAW), *run_items()]


@given(
    st.lists(st.sampled_from(EVENTS)),
    st.sampled_from([FULL, StreamOptions(), StreamOptions(expose_tools="none")]),
    st.booleans(),
)
def test_whatever_a_model_streams_the_sequence_is_legal(
    events: list[Any], options: StreamOptions, failed: bool
) -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=options)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    mapped = [made for event in events for made in mapper.map(event)]
    checker.feed_all(merge(mapped))
    checker.feed_all(mapper.error("internal", "x") if failed else mapper.finished())
    checker.finish()
