"""The events that the Responses API would send for a finished output."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from agents.items import TResponseOutputItem, TResponseStreamEvent
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseUsage,
)
from pydantic import TypeAdapter

EVENT: TypeAdapter[TResponseStreamEvent] = TypeAdapter(TResponseStreamEvent)
Event = dict[str, Any]


def new_id(prefix: str) -> str:
    """Return an id that tells that the demo model made it."""
    return f"{prefix}_demo{secrets.token_hex(12)}"


def stream(
    output: Sequence[TResponseOutputItem], usage: ResponseUsage
) -> Iterator[TResponseStreamEvent]:
    """Yield typed events, numbered in their order."""
    for number, event in enumerate(_events(output, usage)):
        yield EVENT.validate_python({**event, "sequence_number": number})


def _events(
    output: Sequence[TResponseOutputItem], usage: ResponseUsage
) -> Iterator[Event]:
    started: Event = {
        "id": new_id("resp"),
        "object": "response",
        "created_at": time.time(),
        "model": "demo",
        "status": "in_progress",
        "output": [],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }
    finished = {
        **started,
        "status": "completed",
        "output": [item.model_dump() for item in output],
        "usage": usage.model_dump(),
    }
    yield {"type": "response.created", "response": started}
    yield {"type": "response.in_progress", "response": started}
    for index, item in enumerate(output):
        yield from _item(index, item)
    yield {"type": "response.completed", "response": finished}


def _item(index: int, item: TResponseOutputItem) -> Iterator[Event]:
    whole = item.model_dump()
    place = {"item_id": whole["id"], "output_index": index}
    empty: Event = {"status": "in_progress"}
    body: Iterator[Event] = iter(())
    match item:
        case ResponseReasoningItem():
            empty["summary"] = []
            body = _summary(place, item)
        case ResponseOutputMessage():
            empty["content"] = []
            body = _text(place, whole["content"][0])
        case ResponseFunctionToolCall():
            empty["arguments"] = ""
            body = _arguments(place, item)
    yield {
        "type": "response.output_item.added",
        "output_index": index,
        "item": {**whole, **empty},
    }
    yield from body
    yield {"type": "response.output_item.done", "output_index": index, "item": whole}


def _text(place: Event, part: Event) -> Iterator[Event]:
    place = {**place, "content_index": 0}
    yield {
        "type": "response.content_part.added",
        "part": {**part, "text": ""},
        **place,
    }
    for word in _words(part["text"]):
        yield {
            "type": "response.output_text.delta",
            "delta": word,
            "logprobs": [],
            **place,
        }
    yield {
        "type": "response.output_text.done",
        "text": part["text"],
        "logprobs": [],
        **place,
    }
    yield {"type": "response.content_part.done", "part": part, **place}


def _summary(place: Event, item: ResponseReasoningItem) -> Iterator[Event]:
    kind = "response.reasoning_summary"
    for number, part in enumerate(item.summary):
        where = {**place, "summary_index": number}
        whole = part.model_dump()
        yield {"type": f"{kind}_part.added", "part": {**whole, "text": ""}, **where}
        for word in _words(part.text):
            yield {"type": f"{kind}_text.delta", "delta": word, **where}
        yield {"type": f"{kind}_text.done", "text": part.text, **where}
        yield {"type": f"{kind}_part.done", "part": whole, **where}


def _arguments(place: Event, item: ResponseFunctionToolCall) -> Iterator[Event]:
    kind = "response.function_call_arguments"
    for word in _words(item.arguments):
        yield {"type": f"{kind}.delta", "delta": word, **place}
    yield {
        "type": f"{kind}.done",
        "arguments": item.arguments,
        "name": item.name,
        **place,
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*?(?=\s|$)|\s+$", text)
