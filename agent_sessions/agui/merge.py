"""Join adjacent deltas, so that fewer and larger frames leave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
