"""Describe the approvals that a paused run waits for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from agent_sessions.agui.content import as_dict, clean, string
from agent_sessions.agui.options import StreamOptions
from agent_sessions.agui.tools import Call, exposed_arguments

RESPONSE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "approved": {"type": "boolean"},
        "reason": {"type": "string"},
        "always": {"type": "boolean"},
    },
    "required": ["approved"],
}


def interrupts(
    interruptions: Iterable[Any],
    expires_at: datetime | None = None,
    *,
    message: Callable[[str], str] | None = None,
) -> list[dict[str, Any]]:
    """Turn the SDK's approval items into AG-UI interrupts, JSON-able, for the row.

    Each has an id of its own, since models give a call's id again: an answer to an
    earlier pause fits no later one. Tool and arguments are always there, in `metadata`,
    for a person has to decide on them. `message` makes the question from the tool's
    name.
    """
    # Late: this room needs no Django but for times without an offset.
    from agent_sessions.times import iso

    described = []
    pause = secrets.token_hex(8)
    for number, item in enumerate(interruptions):
        call_id = call_id_of(item)
        tool = clean(item.qualified_name or item.name or "tool")
        described.append(
            {
                "id": f"{pause}:{number}",
                "reason": "tool_call",
                "toolCallId": call_id,
                **({"message": clean(message(tool))} if message else {}),
                "responseSchema": RESPONSE_SCHEMA,
                **({"expiresAt": iso(expires_at)} if expires_at else {}),
                "metadata": {
                    "toolName": tool,
                    "arguments": clean(item.arguments or ""),
                },
            }
        )
    return described


def call_id_of(item: Any) -> str:
    """Return the id of the call that an approval item asks about."""
    raw = as_dict(item.raw_item)
    return string(item.call_id) or string(raw.get("id"))


def calls_of(asked: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the calls that interrupts ask about, in a fixed order, to compare them."""
    return sorted(
        (
            each["toolCallId"],
            each["metadata"]["toolName"],
            each["metadata"]["arguments"],
        )
        for each in asked
    )


def add_pending_calls(
    messages: Sequence[dict[str, Any]],
    open_interrupts: Iterable[dict[str, Any]],
    options: StreamOptions,
) -> list[dict[str, Any]]:
    """Append the calls that interrupts name and that the messages lack.

    The SDK holds a paused turn's items back from the session where an output
    guardrail has still to judge them; the approval must have its call all the same.
    """
    if options.expose_tools == "none":
        return list(messages)
    known = {
        call["id"] for message in messages for call in message.get("toolCalls", ())
    }
    added = []
    for interrupt in open_interrupts:
        metadata = interrupt["metadata"]
        call = Call(
            interrupt["toolCallId"], metadata["toolName"], metadata["arguments"]
        )
        if call.id not in known:
            known.add(call.id)
            added.append(call_message(call, options))
    return [*messages, *added]


def call_message(
    call: Call, options: StreamOptions, *, message_id: str | None = None
) -> dict[str, Any]:
    """Return the assistant message that carries one tool call."""
    function = {"name": call.name, "arguments": exposed_arguments(call, options)}
    return {
        "id": message_id or call.id,
        "role": "assistant",
        "toolCalls": [{"id": call.id, "type": "function", "function": function}],
    }
