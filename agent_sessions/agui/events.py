"""The events of one run: its start, what the SDK streams, its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from agent_sessions.agui.calls import (
    HANDOFF,
    add_pending_calls,
    output_call_id,
)
from agent_sessions.agui.content import StreamOptions, as_dict, clean
from agent_sessions.agui.output import OutputItems

_TARGETS = {
    "TEXT_MESSAGE_CONTENT": "messageId",
    "TOOL_CALL_ARGS": "toolCallId",
    "REASONING_MESSAGE_CONTENT": "messageId",
}


def merge(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbours of the same kind, id and metadata; the input stays as it is."""
    merged: list[dict[str, Any]] = []
    deltas: list[str] = []
    current: tuple[Any, ...] | None = None
    for event in events:
        target = _TARGETS.get(event["type"])
        key = (event["type"], event[target], event.get("metadata")) if target else None
        if key is not None and key == current:
            deltas.append(event["delta"])
            continue
        _close(merged, deltas)
        merged.append(event)
        current = key
        if key is not None:
            deltas.append(event["delta"])
    _close(merged, deltas)
    return merged


def _close(merged: list[dict[str, Any]], deltas: list[str]) -> None:
    if len(deltas) > 1:
        merged[-1] = {**merged[-1], "delta": "".join(deltas)}
    deltas.clear()


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


def snapshot(messages: Sequence[Event], **metadata: Any) -> Event:
    """Restate the conversation.

    `before` is the cursor of what is earlier, `branch` the name of what is shown, and
    `siblings` the place of what comes next among other branches. None is left out.
    """
    event: Event = {"type": "MESSAGES_SNAPSHOT", "messages": list(messages)}
    told = {name: value for name, value in metadata.items() if value}
    return {**event, "metadata": told} if told else event


_ENDS = {
    "TEXT_MESSAGE_START": ("TEXT_MESSAGE_END", "messageId"),
    "TOOL_CALL_START": ("TOOL_CALL_END", "toolCallId"),
    "REASONING_START": ("REASONING_END", "messageId"),
    "REASONING_MESSAGE_START": ("REASONING_MESSAGE_END", "messageId"),
    "STEP_STARTED": ("STEP_FINISHED", "stepName"),
}
LAST = frozenset({"RUN_FINISHED", "RUN_ERROR"})


class OpenRun:
    """What a listener has heard the beginning of, and not yet the end."""

    def __init__(self) -> None:
        self.run_id = ""
        # The branch that it was shown last, as far as it was told.
        self.branch = ""
        self._ends: list[Event] = []

    def follow(self, event: Event) -> None:
        """Take in the next event that the listener hears."""
        kind = event["type"]
        if kind == "RUN_STARTED" or kind in LAST:
            self.run_id = event["runId"] if kind == "RUN_STARTED" else ""
            self._ends = []
        elif kind == "MESSAGES_SNAPSHOT":
            self.branch = event.get("metadata", {}).get("branch", self.branch)
        elif kind in _ENDS:
            end, name = _ENDS[kind]
            self._ends.insert(0, {"type": end, name: event[name]})
        elif event in self._ends:
            self._ends.remove(event)

    def ends(self) -> list[Event]:
        """Return the events that close what is open within the run."""
        return list(self._ends)


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


class EventMapper:
    """Maps the stream of one run; every sequence it gives is legal AG-UI.

    Raw model events make the deltas; run items fill in what a model didn't stream.
    """

    def __init__(
        self, *, thread_id: str, run_id: str, options: StreamOptions | None = None
    ) -> None:
        self.thread_id = thread_id
        self.run_id = run_id
        self.options = options or StreamOptions()
        self._items = OutputItems(run_id, self.options)
        self._step: str | None = None
        self._over = False

    def started(self, user_messages: Sequence[dict[str, Any]] = ()) -> Event:
        """Open the run."""
        return run_started(self.thread_id, self.run_id, user_messages)

    def map(self, event: Any) -> list[Event]:
        """Map one SDK stream event; after the run's end nothing comes any more."""
        events: list[Event] = []
        if self._over:
            return events
        if event.type == "raw_response_event":
            self._items.raw(event.data, events)
        elif event.type == "run_item_stream_event":
            if event.name == "handoff_occured":
                self._handoff(event.item, events)
            else:
                self._items.run_item(event.name, event.item, events)
        else:
            self._enter_agent(event.new_agent, events)
        return events

    def finished(
        self, usage: Any = None, *, outcome: Literal["success", "cancelled"] = "success"
    ) -> list[Event]:
        """Close what is open, then the run."""
        end = run_finished(self.thread_id, self.run_id, {"type": outcome}, usage)
        return self._end(end)

    def interrupted(
        self,
        asked: Sequence[Event],
        *,
        messages: list[Event],
        metadata: Mapping[str, Any] | None = None,
        usage: Any = None,
    ) -> list[Event]:
        """Close the run on the approvals that `interrupts` has described."""
        shown = add_pending_calls(messages, asked, self.options)
        return self._end(
            run_finished(
                self.thread_id,
                self.run_id,
                {"type": "interrupt", "interrupts": list(asked)},
                usage,
            ),
            snapshot(shown, **(metadata or {})),
        )

    def error(
        self, code: str, message: str, usage: Any = None, *last_words: Event
    ) -> list[Event]:
        """Close what is open, say what the end needs, then close the run as failed."""
        end = run_error(code, message, run_id=self.run_id, usage=usage)
        return self._end(end, *last_words)

    def _end(self, end: Event, *last_words: Event) -> list[Event]:
        if self._over:
            return []
        self._over = True
        return [*self._close_all(), *last_words, end]

    def _close_all(self) -> list[Event]:
        events: list[Event] = []
        self._items.close(events)
        if self._step is not None:
            events.append({"type": "STEP_FINISHED", "stepName": self._step})
            self._step = None
        return events

    def _enter_agent(self, agent: Any, events: list[Event]) -> None:
        events.extend(self._close_all())
        self._step = self._items.agent_name = clean(agent.name)
        self._items.handoff_tools = handoff_tool_names(agent)
        events.append({"type": "STEP_STARTED", "stepName": self._step})

    def _handoff(self, item: Any, events: list[Event]) -> None:
        self._items.end_handoff(output_call_id(as_dict(item.raw_item)), events)
        source, target = item.source_agent, item.target_agent
        events.append(
            {
                "type": "CUSTOM",
                "name": HANDOFF,
                "value": {"from": clean(source.name), "to": clean(target.name)},
            }
        )


def handoff_tool_names(agent: Any) -> frozenset[str]:
    """Return the names of the tools by which an agent hands over."""
    # Here, where a run is going and so it is loaded: it takes seconds.
    from agents import Handoff

    return frozenset(
        entry.tool_name
        if isinstance(entry, Handoff)
        else Handoff.default_tool_name(entry)
        for entry in agent.handoffs
    )
