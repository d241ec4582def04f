"""Check events against `ag_ui.core`, and their order against the client's rules."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ag_ui.core import Event
from pydantic import BaseModel, TypeAdapter

EVENT = TypeAdapter(Event)


def validate_event(event: dict[str, Any]) -> None:
    """Raise AssertionError or ValidationError unless the event is exact AG-UI 1.0.

    Exact means: it validates, holds no key that AG-UI doesn't know, and comes back
    from the typed model as it went in, so no null and no snake_case name slips in.
    """
    wire = json.loads(json.dumps(event, allow_nan=False))
    model = EVENT.validate_python(wire)
    assert not (unknown := list(_unknown(model))), f"unknown keys {unknown} in {wire}"
    back = EVENT.dump_python(model, mode="json", by_alias=True, exclude_none=True)
    assert back == wire, f"{wire} comes back as {back}"


def _unknown(value: Any, path: str = "") -> Iterable[str]:
    if isinstance(value, BaseModel):
        yield from (f"{path}.{key}" for key in value.model_extra or ())
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _unknown(entry, f"{path}[{index}]")


class SequenceError(AssertionError):
    """An event comes where the official client refuses it."""


class SequenceChecker:
    """Checks events one by one, as `verifyEvents` of @ag-ui/client 1.0 does.

    Stricter where it costs nothing: a RUN_ERROR too must find everything closed.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._running = False
        self._ended = False
        self._open: dict[str, set[str]] = {}

    def feed(self, event: dict[str, Any]) -> None:
        """Take the next event of a stream."""
        validate_event(event)
        kind = event["type"]
        if kind == "RUN_STARTED":
            self._check(not self._running, "a run is still active", event)
            self._running, self._ended, self._open = True, False, {}
        elif kind == "RUN_ERROR":
            self._check_closed(event)
            self._running, self._ended = False, True
        else:
            self._check(self._running, "no run is active", event)
            self._middle(kind, event)
        self.events.append(event)

    def feed_all(self, events: Iterable[dict[str, Any]]) -> None:
        """Take the next events of a stream."""
        for event in events:
            self.feed(event)

    def finish(self) -> None:
        """Check that the run has ended."""
        if not self._ended:
            raise SequenceError("the run has not ended")

    def _middle(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "RUN_FINISHED":
            self._check_closed(event)
            self._running, self._ended = False, True
            return
        rule = _RULES.get(kind)
        if rule is None:
            return
        what, key, act = rule
        name, names = event[key], self._open.setdefault(what, set())
        if act == "open":
            self._check(name not in names, f"{what} {name!r} is already open", event)
            names.add(name)
            return
        self._check(name in names, f"{what} {name!r} is not open", event)
        if act == "close":
            names.remove(name)

    def _check_closed(self, event: dict[str, Any]) -> None:
        left = {what: names for what, names in self._open.items() if names}
        self._check(not left, f"still open: {left}", event)

    def _check(self, right: bool, why: str, event: dict[str, Any]) -> None:
        if not right:
            raise SequenceError(f"{why}, at {event} after {self.events[-5:]}")


_RULES = {
    "TEXT_MESSAGE_START": ("message", "messageId", "open"),
    "TEXT_MESSAGE_CONTENT": ("message", "messageId", "use"),
    "TEXT_MESSAGE_END": ("message", "messageId", "close"),
    "TOOL_CALL_START": ("tool call", "toolCallId", "open"),
    "TOOL_CALL_ARGS": ("tool call", "toolCallId", "use"),
    "TOOL_CALL_END": ("tool call", "toolCallId", "close"),
    "REASONING_START": ("reasoning", "messageId", "open"),
    "REASONING_END": ("reasoning", "messageId", "close"),
    "REASONING_MESSAGE_START": ("reasoning message", "messageId", "open"),
    "REASONING_MESSAGE_CONTENT": ("reasoning message", "messageId", "use"),
    "REASONING_MESSAGE_END": ("reasoning message", "messageId", "close"),
    "STEP_STARTED": ("step", "stepName", "open"),
    "STEP_FINISHED": ("step", "stepName", "close"),
}
