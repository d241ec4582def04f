"""Follow the output items of a model's responses: messages, reasoning, calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from agent_sessions.agui.calls import (
    OUTPUT_TYPES,
    Call,
    exposed_arguments,
    exposed_result,
    output_call_id,
    read_call,
)
from agent_sessions.agui.content import (
    StreamOptions,
    as_dict,
    clean,
    message_text,
    output_text,
    reasoning_text,
    string,
)
from agent_sessions.agui.messages import IdPool, own_id, result_id

Kind = Literal["message", "reasoning", "call"]


@dataclass(slots=True)
class OpenItem:
    """A message, a reasoning or a tool call that has started and not ended."""

    kind: Kind
    id: str
    raw_id: str
    started: bool = True
    filled: bool = False
    part: tuple[str, int] | None = None


@dataclass(slots=True)
class Response:
    """What has been shown of the response that streams, so as not to repeat it."""

    shown: list[tuple[Kind, str, str | None]] = field(default_factory=list)

    def was_shown(self, kind: Kind, raw_id: str, text: str | None) -> bool:
        """Return whether an item was shown, and strike it from the list."""
        for entry in self.shown:
            if entry[:2] == (kind, raw_id) and entry[2] in (None, text):
                self.shown.remove(entry)
                return True
        return False


Event = dict[str, Any]

# The index of an item that did not stream but came whole as a run item.
UNSTREAMED = -1


_Handler = Callable[["OutputItems", Any, list[Event]], None]


class OutputItems:
    """Maps output items, streamed or whole; `close` ends whatever is still open.

    Items are told apart by their index in the response, because models that don't
    speak the Responses API give all of them one id.
    """

    def __init__(self, run_id: str, options: StreamOptions) -> None:
        self.agent_name = ""
        self.handoff_tools: frozenset[str] = frozenset()
        self._run_id = run_id
        self._options = options
        self._ids = IdPool()
        self._made = 0
        self._open: dict[tuple[Kind, int], OpenItem] = {}
        self._hidden_calls: set[str] = set()
        self._answered_calls: set[str] = set()
        self._response = Response()

    def raw(self, data: Any, events: list[Event]) -> None:
        """Map one event of the model's own stream."""
        kind = data.type
        if kind == "response.created":
            # It may be a retry that cut the last response short.
            self.close(events)
            self._response = Response()
        elif kind == "response.completed":
            self.close(events)
        handler = self._raw.get(kind)
        if handler is not None:
            handler(self, data, events)

    def run_item(self, name: str, item: Any, events: list[Event]) -> None:
        """Map a run item: what has streamed is known, the rest is shown whole."""
        handler = self._items.get(name)
        if handler is not None:
            handler(self, as_dict(item.raw_item), events)

    def end_handoff(self, call_id: str, events: list[Event]) -> None:
        """Answer a handoff's call where it was announced as a tool's."""
        if (
            self._response.was_shown("call", call_id, None)
            and call_id not in self._hidden_calls
        ):
            self._result(call_id, "", events)

    def close(self, events: list[Event]) -> None:
        """End every open item."""
        for entry in self._open.values():
            self._close(entry, events)
            self._response.shown.append((entry.kind, entry.raw_id, None))
        self._open.clear()

    def _close(self, entry: OpenItem, events: list[Event]) -> None:
        if not entry.started:
            return
        if entry.kind == "message":
            events.append({"type": "TEXT_MESSAGE_END", "messageId": entry.id})
        elif entry.kind == "call":
            events.append({"type": "TOOL_CALL_END", "toolCallId": entry.id})
        else:
            events.append({"type": "REASONING_MESSAGE_END", "messageId": entry.id})
            events.append({"type": "REASONING_END", "messageId": entry.id})

    # Output items, as they stream

    def _item_added(self, data: Any, events: list[Event]) -> None:
        item = as_dict(data.item)
        kind = item.get("type")
        if kind == "message":
            self._open_message(data.output_index, string(item.get("id")), events)
        elif kind == "reasoning":
            self._open_reasoning(data.output_index, string(item.get("id")))
        elif (call := read_call(item)) is not None:
            self._open_call(data.output_index, call, events)

    def _item_done(self, data: Any, events: list[Event]) -> None:
        item = as_dict(data.item)
        kind = item.get("type")
        if kind == "message":
            self._finish_message(data.output_index, item, events)
        elif kind == "reasoning":
            self._finish_reasoning(data.output_index, item, events)
        elif kind in OUTPUT_TYPES:
            self._show_result(item, events)
        elif (call := read_call(item)) is not None:
            self._finish_call(data.output_index, call, events)

    # Messages

    def _open_message(self, index: int, raw_id: str, events: list[Event]) -> OpenItem:
        entry = self._open.get(("message", index))
        if entry is None:
            entry = OpenItem("message", self._new_id(raw_id), raw_id)
            self._open["message", index] = entry
            start = {
                "type": "TEXT_MESSAGE_START",
                "messageId": entry.id,
                "role": "assistant",
            }
            if self.agent_name:
                start["name"] = self.agent_name
            events.append(start)
        return entry

    def _text_delta(self, data: Any, events: list[Event]) -> None:
        entry = self._open.get(("message", data.output_index))
        if entry is None:
            entry = self._open_message(data.output_index, data.item_id, events)
        if data.delta:
            entry.filled = True
            events.append(
                {
                    "type": "TEXT_MESSAGE_CONTENT",
                    "messageId": entry.id,
                    "delta": clean(data.delta),
                }
            )

    def _refusal_delta(self, data: Any, events: list[Event]) -> None:
        before = len(events)
        self._text_delta(data, events)
        for event in events[before:]:
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                event["metadata"] = {"refusal": True}

    def _finish_message(
        self, index: int, item: dict[str, Any], events: list[Event]
    ) -> None:
        entry = self._open_message(index, string(item.get("id")), events)
        text, refusal = message_text(item)
        if text and not entry.filled:
            content: Event = {
                "type": "TEXT_MESSAGE_CONTENT",
                "messageId": entry.id,
                "delta": text,
            }
            if refusal:
                content["metadata"] = {"refusal": True}
            events.append(content)
        self._close(entry, events)
        del self._open["message", index]
        self._response.shown.append(("message", string(item.get("id")), text))

    def _message_created(self, raw: Event, events: list[Event]) -> None:
        if not self._response.was_shown(
            "message", string(raw.get("id")), message_text(raw)[0]
        ):
            self._finish_message(UNSTREAMED, raw, events)
            self._response.shown.pop()

    # Reasoning

    def _open_reasoning(self, index: int, raw_id: str) -> OpenItem:
        entry = self._open.get(("reasoning", index))
        if entry is None:
            # It starts with its first words: most reasoning comes without any.
            entry = OpenItem("reasoning", "", raw_id, started=False)
            self._open["reasoning", index] = entry
        return entry

    def _summary_delta(self, data: Any, events: list[Event]) -> None:
        part = ("summary", data.summary_index)
        self._reasoning_delta(data, part, events)

    def _reasoning_text_delta(self, data: Any, events: list[Event]) -> None:
        part = ("text", data.content_index)
        self._reasoning_delta(data, part, events)

    def _reasoning_delta(
        self, data: Any, part: tuple[str, int], events: list[Event]
    ) -> None:
        entry = self._open_reasoning(data.output_index, data.item_id)
        if not data.delta or not self._options.stream_reasoning:
            return
        if entry.part is not None and entry.part[0] != part[0]:
            # The summary and the full text tell the same; what came first stays.
            return
        if entry.part is not None and entry.part != part:
            self._reason(entry, "\n\n", events)
        entry.part = part
        self._reason(entry, clean(data.delta), events)

    def _reason(self, entry: OpenItem, delta: str, events: list[Event]) -> None:
        if not entry.started:
            entry.started = True
            entry.id = self._new_id(entry.raw_id)
            events.append({"type": "REASONING_START", "messageId": entry.id})
            events.append(
                {
                    "type": "REASONING_MESSAGE_START",
                    "messageId": entry.id,
                    "role": "reasoning",
                }
            )
        entry.filled = True
        events.append(
            {
                "type": "REASONING_MESSAGE_CONTENT",
                "messageId": entry.id,
                "delta": delta,
            }
        )

    def _finish_reasoning(
        self, index: int, item: dict[str, Any], events: list[Event]
    ) -> None:
        entry = self._open_reasoning(index, string(item.get("id")))
        text = reasoning_text(item)
        if text and not entry.filled and self._options.stream_reasoning:
            self._reason(entry, text, events)
        self._close(entry, events)
        del self._open["reasoning", index]
        self._response.shown.append(("reasoning", string(item.get("id")), text))

    def _reasoning_created(self, raw: Event, events: list[Event]) -> None:
        if not self._response.was_shown(
            "reasoning", string(raw.get("id")), reasoning_text(raw)
        ):
            self._finish_reasoning(UNSTREAMED, raw, events)
            self._response.shown.pop()

    # Tool calls

    def _open_call(self, index: int, call: Call, events: list[Event]) -> OpenItem:
        entry = self._open.get(("call", index))
        if entry is None:
            hidden = (
                self._options.expose_tools == "none" or call.name in self.handoff_tools
            )
            self._close_twin(call.id, events)
            entry = OpenItem("call", call.id, call.id, started=not hidden)
            self._open["call", index] = entry
            if hidden:
                self._hidden_calls.add(call.id)
            else:
                self._hidden_calls.discard(call.id)
                self._answered_calls.discard(call.id)
                events.append(
                    {
                        "type": "TOOL_CALL_START",
                        "toolCallId": call.id,
                        "toolCallName": call.name,
                    }
                )
        return entry

    def _close_twin(self, call_id: str, events: list[Event]) -> None:
        """End an open call of the same id: models repeat ids, AG-UI forbids it."""
        for key, entry in list(self._open.items()):
            if entry.kind == "call" and entry.id == call_id:
                self._close(entry, events)
                del self._open[key]

    def _arguments_delta(self, data: Any, events: list[Event]) -> None:
        entry = self._open.get(("call", data.output_index))
        if entry is not None and data.delta and self._options.expose_tools == "full":
            self._argue(entry, clean(data.delta), events)

    def _argue(self, entry: OpenItem, delta: str, events: list[Event]) -> None:
        if delta and entry.started:
            entry.filled = True
            events.append(
                {"type": "TOOL_CALL_ARGS", "toolCallId": entry.id, "delta": delta}
            )

    def _finish_call(self, index: int, call: Call, events: list[Event]) -> None:
        entry = self._open_call(index, call, events)
        if not entry.filled:
            self._argue(entry, exposed_arguments(call, self._options), events)
        self._close(entry, events)
        del self._open["call", index]
        self._response.shown.append(("call", call.id, None))
        if call.result is not None and entry.started:
            self._result(call.id, call.result, events)

    def _tool_called(self, raw: Event, events: list[Event]) -> None:
        call = read_call(raw)
        if call is None:
            return
        mistaken = (
            call.id in self._hidden_calls and self._options.expose_tools != "none"
        )
        if mistaken:
            # A tool that only looks like a handoff.
            self.handoff_tools -= {call.name}
        if not self._response.was_shown("call", call.id, None) or mistaken:
            self._finish_call(UNSTREAMED, call, events)
            self._response.shown.pop()

    def _show_result(self, item: dict[str, Any], events: list[Event]) -> None:
        call_id = output_call_id(item)
        if call_id and call_id not in self._hidden_calls:
            self._result(call_id, output_text(item), events)

    def _result(self, call_id: str, text: str, events: list[Event]) -> None:
        if self._options.expose_tools == "none" or call_id in self._answered_calls:
            return
        self._answered_calls.add(call_id)
        events.append(
            {
                "type": "TOOL_CALL_RESULT",
                "messageId": result_id(call_id),
                "toolCallId": call_id,
                "role": "tool",
                **exposed_result(text, self._options),
            }
        )

    def _new_id(self, raw_id: str) -> str:
        self._made += 1
        return self._ids.take(own_id(raw_id), f"{self._run_id}/{self._made}")

    _raw: ClassVar[dict[str, _Handler]] = {
        "response.output_text.delta": _text_delta,
        "response.refusal.delta": _refusal_delta,
        "response.function_call_arguments.delta": _arguments_delta,
        "response.mcp_call_arguments.delta": _arguments_delta,
        "response.reasoning_summary_text.delta": _summary_delta,
        "response.reasoning_text.delta": _reasoning_text_delta,
        "response.output_item.added": _item_added,
        "response.output_item.done": _item_done,
    }

    _items: ClassVar[dict[str, _Handler]] = {
        "message_output_created": _message_created,
        "reasoning_item_created": _reasoning_created,
        "tool_called": _tool_called,
        "tool_output": _show_result,
    }
