"""Joining of deltas, and the legality of every mapped sequence."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_sessions.agui import merge


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


@settings(deadline=None)
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
