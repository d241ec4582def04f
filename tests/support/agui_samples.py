"""Agents, tools, items and model events that the tests of agui share."""

from __future__ import annotations

from typing import Any

from agents import (
    Agent,
    RawResponsesStreamEvent,
    function_tool,
)
from agents.testing import ModelStep, ScriptedModel
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseReasoningItem,
    ResponseTextDeltaEvent,
)
from openai.types.responses.response_reasoning_item import Content, Summary

from agent_sessions.agui import (
    EventMapper,
    StreamOptions,
)

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
