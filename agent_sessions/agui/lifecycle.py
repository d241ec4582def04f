"""The events that open and close a run, and what stands between for a sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_sessions.agui.interrupts import add_pending_calls
from agent_sessions.agui.options import StreamOptions

Event = dict[str, Any]

PROTOCOL_VERSION = "1.0"
MAX_COUNT = 2**53 - 1


def run_started(thread_id: str, run_id: str, messages: Sequence[Event] = ()) -> Event:
    """Open a run; its input holds the new messages, so that other tabs show them."""
    return {
        "type": "RUN_STARTED",
        "threadId": thread_id,
        "runId": run_id,
        "protocolVersion": PROTOCOL_VERSION,
        "input": {
            "threadId": thread_id,
            "runId": run_id,
            "state": {},
            "messages": list(messages),
            "tools": [],
            "context": [],
            "forwardedProps": {},
        },
    }


def run_finished(
    thread_id: str, run_id: str, outcome: dict[str, Any], usage: Any = None
) -> Event:
    """Close a run with its outcome."""
    event = {
        "type": "RUN_FINISHED",
        "threadId": thread_id,
        "runId": run_id,
        "outcome": outcome,
    }
    return _with_usage(event, usage)


def run_error(
    code: str, message: str, *, run_id: str | None = None, usage: Any = None
) -> Event:
    """End a run that failed, or refuse a frame.

    AG-UI's RUN_ERROR has no run id, so it travels in the metadata.
    """
    event: Event = {"type": "RUN_ERROR", "code": code, "message": message}
    if run_id:
        event["metadata"] = {"runId": run_id}
    return _with_usage(event, usage)


def snapshot(messages: Sequence[Event], *, before: str | None = None) -> Event:
    """Restate the conversation; `before` is the cursor of what is earlier."""
    event: Event = {"type": "MESSAGES_SNAPSHOT", "messages": list(messages)}
    if before is not None:
        event["metadata"] = {"before": before}
    return event


def idle_sync(
    thread_id: str,
    run_id: str,
    messages: Sequence[Event],
    *,
    before: str | None = None,
    open_interrupts: Sequence[Event] = (),
    options: StreamOptions | None = None,
) -> list[Event]:
    """Answer a sync where nothing runs, as a legal run of its own.

    Open interrupts are the outcome again, so that a reloaded page can ask; their
    calls join the messages as far as the options let them be seen.
    """
    outcome: dict[str, Any] = {"type": "success"}
    if open_interrupts:
        outcome = {"type": "interrupt", "interrupts": list(open_interrupts)}
        if options is not None:
            messages = add_pending_calls(messages, open_interrupts, options)
    return [
        run_started(thread_id, run_id),
        snapshot(messages, before=before),
        run_finished(thread_id, run_id, outcome),
    ]


def token_usage(usage: Any) -> list[dict[str, int]]:
    """Turn the SDK's Usage into AG-UI's list; empty where nothing was counted."""
    if usage is None:
        return []
    counts = {
        "inputTokens": usage.input_tokens,
        "outputTokens": usage.output_tokens,
        "totalTokens": usage.total_tokens,
        "reasoningTokens": getattr(usage.output_tokens_details, "reasoning_tokens", 0),
        "cachedInputTokens": getattr(usage.input_tokens_details, "cached_tokens", 0),
        "cacheWriteInputTokens": getattr(
            usage.input_tokens_details, "cache_write_tokens", 0
        ),
    }
    # The SDK writes 0 where a provider said nothing, so 0 is not told apart.
    entry = {
        key: value
        for key, value in counts.items()
        if isinstance(value, int) and 0 < value <= MAX_COUNT
    }
    return [entry] if entry else []


def _with_usage(event: Event, usage: Any) -> Event:
    if entries := token_usage(usage):
        event["usage"] = entries
    return event
