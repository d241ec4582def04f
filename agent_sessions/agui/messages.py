"""Turn stored items into AG-UI messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from agent_sessions.agui.calls import (
    HANDOFF,
    OUTPUT_TYPES,
    call_message,
    exposed_result,
    output_call_id,
    read_call,
)
from agent_sessions.agui.content import (
    StreamOptions,
    message_text,
    output_text,
    plain_text,
    reasoning_text,
    string,
    user_content,
)
from agent_sessions.items.kinds import HANDOFF_PREFIX, ended_early, handoff_target

SHORTEST_UNIQUE_ID = 20
LONGEST_ID = 255


def own_id(value: Any) -> str | None:
    """Return an id if it looks unique in the world, else None."""
    if (
        isinstance(value, str)
        and SHORTEST_UNIQUE_ID <= len(value) <= LONGEST_ID
        and value.isascii()
        and value.isprintable()
        and sum(map(str.isdigit, value)) >= 2
    ):
        return value
    return None


def result_id(call_id: str) -> str:
    """Name the message that holds a tool call's result."""
    return f"{call_id}:result"


class IdPool:
    """Hands out ids, each one once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def take(self, wanted: str | None, fallback: str) -> str:
        """Return the wanted id if there is one and it is free, else the fallback."""
        chosen = wanted if wanted and wanted not in self._taken else fallback
        number = 1
        name = chosen
        while name in self._taken:
            number += 1
            name = f"{chosen}.{number}"
        self._taken.add(name)
        return name


Message = dict[str, Any]


class Stored(Protocol):
    """An item with its place in the session; `item` is None where it is unreadable."""

    @property
    def position(self) -> int: ...
    @property
    def item(self) -> dict[str, Any] | None: ...
    @property
    def message_id(self) -> str: ...
    @property
    def agent_name(self) -> str: ...
    @property
    def siblings(self) -> dict[str, Any] | None: ...


def messages_from_items(
    stored: Iterable[Stored], options: StreamOptions | None = None
) -> list[Message]:
    """Turn stored items into messages, passing over what is no message.

    An id depends on the item and its position alone, so a message keeps its id
    whichever page of the history it is read in.
    """
    reader = _Reader(options or StreamOptions())
    for entry in stored:
        if entry.item is not None:
            reader.read(entry, entry.item)
    return reader.messages


class _Reader:
    def __init__(self, options: StreamOptions) -> None:
        self.messages: list[Message] = []
        self._options = options
        self._ids = IdPool()
        self._call_names: dict[str, str] = {}
        self._call_places: dict[str, int] = {}

    def read(self, entry: Stored, item: Mapping[str, Any]) -> None:
        position = entry.position
        kind = string(item.get("type")) or ("message" if "role" in item else "")
        if kind == "message":
            self._message(entry, item)
        elif kind == "reasoning":
            self._reasoning(position, item)
        elif kind in OUTPUT_TYPES:
            self._output(position, item)
        else:
            self._call(position, item)

    def _message(self, entry: Stored, item: Mapping[str, Any]) -> None:
        role = string(item.get("role"))
        build = _ROLES.get(role)
        hidden = role in _INSTRUCTIONS and not self._options.expose_instructions
        if build is not None and not hidden:
            wanted = own_id(item.get("id")) or entry.message_id
            message_id = self._take(wanted, entry.position)
            message = build(message_id, item, self._options)
            if entry.agent_name:
                message["name"] = entry.agent_name
            if entry.siblings:
                message |= {"metadata": {"siblings": entry.siblings}}
            self.messages.append(message)

    def _reasoning(self, position: int, item: Mapping[str, Any]) -> None:
        text = reasoning_text(item)
        if text and self._options.stream_reasoning:
            message_id = self._take(own_id(item.get("id")), position)
            self.messages.append(
                {"id": message_id, "role": "reasoning", "content": text}
            )

    def _call(self, position: int, item: Mapping[str, Any]) -> None:
        call = read_call(item)
        if call is None:
            return
        self._call_names[call.id] = call.name
        if self._options.expose_tools == "none":
            return
        self._call_places[call.id] = len(self.messages)
        message_id = self._take(call.id, position)
        self.messages.append(call_message(call, self._options, message_id=message_id))
        if call.result is not None:
            self._result(position, call.id, call.result)

    def _output(self, position: int, item: Mapping[str, Any]) -> None:
        call_id = output_call_id(item)
        if not call_id:
            return
        is_handoff = self._call_names.get(call_id, "").startswith(HANDOFF_PREFIX)
        target = handoff_target(item.get("output")) if is_handoff else ""
        if target:
            self._handoff(position, call_id, target)
        elif self._options.expose_tools != "none":
            self._result(position, call_id, output_text(item))

    def _result(self, position: int, call_id: str, text: str) -> None:
        self.messages.append(
            {
                "id": self._take(result_id(call_id), position),
                "role": "tool",
                "toolCallId": call_id,
                **exposed_result(text, self._options),
            }
        )

    def _handoff(self, position: int, call_id: str, target: str) -> None:
        """Put an activity in the place of the handoff's call, as the stream does."""
        activity = {
            "id": f"item-{position}",
            "role": "activity",
            "activityType": HANDOFF,
            "content": {"to": target},
        }
        place = self._call_places.pop(call_id, None)
        if place is None:
            self.messages.append(activity)
        else:
            self.messages[place] = activity

    def _take(self, wanted: str | None, position: int) -> str:
        return self._ids.take(wanted, f"item-{position}")


def _user(message_id: str, item: Mapping[str, Any], options: StreamOptions) -> Message:
    content = user_content(item, options)
    return {"id": message_id, "role": "user", "content": content}


def _assistant(
    message_id: str, item: Mapping[str, Any], options: StreamOptions
) -> Message:
    text, refusal = message_text(item)
    message: Message = {"id": message_id, "role": "assistant", "content": text}
    if refusal or ended_early(item):
        message["metadata"] = {"refusal" if refusal else "stopped": True}
    return message


def _instruction(
    message_id: str, item: Mapping[str, Any], options: StreamOptions
) -> Message:
    return {"id": message_id, "role": item["role"], "content": plain_text(item)}


_INSTRUCTIONS = frozenset({"system", "developer"})
_ROLES: dict[str, Callable[[str, Mapping[str, Any], StreamOptions], Message]] = {
    "user": _user,
    "assistant": _assistant,
    "system": _instruction,
    "developer": _instruction,
}
