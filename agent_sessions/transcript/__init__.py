"""Make stored items readable: pure functions, no Django, no SDK.

`parse` understands one item, `join` puts a page of them together. Both are total:
whatever a row holds gives an entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from agent_sessions.characters import cut_whole
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import (
    HANDOFF_PREFIX,
    KINDS,
    Family,
    ended_early,
    handoff_target,
)
from agent_sessions.transcript.parts import (
    Entry,
    Item,
    Kind,
    Part,
    PartKind,
    content_parts,
    encrypted_parts,
    image_part,
    json_part,
    link_part,
    listed,
    maybe_json,
    objects,
    string,
    text_part,
    texts,
)

__all__ = ["Entry", "Kind", "Line", "Part", "PartKind", "join", "parse"]

UNREADABLE_LENGTH = 200
# The fields of an entry that a reader of items fills.
Fields = dict[str, Any]


def parse(item: Any, raw: str = "") -> Entry:
    """Turn an item into an entry; None, or what is no JSON object, is unreadable.

    `raw` is the row's text, of which an unreadable entry shows the beginning.
    """
    if not isinstance(item, dict):
        return _unreadable(raw)
    # An item that only holds such a mark is shown as what it is.
    if item.get("__enc__") == 1 and item.keys().isdisjoint({"type", "role"}):
        return Entry(
            Kind.ENCRYPTED,
            name=string(item.get("kid")),
            parts=encrypted_parts(item.get("payload")),
        )
    kind = string(item.get("type")) or _guess_type(item)
    known = KINDS.get(kind)
    shown, read = _READERS[known.family] if known else (Kind.UNKNOWN, _unknown)
    read = _list_tools if kind == "mcp_list_tools" else read
    fields: Fields = {"kind": shown, "type": kind, "id": _id(item)}
    if known:
        fields["status"] = string(item.get("status"))
    return Entry(**fields | read(kind, item))


def _guess_type(item: Item) -> str:
    """Name an item without a type: the SDK leaves it out in two cases."""
    if "role" in item:
        return "message"
    return "item_reference" if item.keys() == {"id"} else ""


def _unreadable(raw: str) -> Entry:
    problem = ""
    try:
        found = json.loads(raw)
        problem = f"a JSON {type(found).__name__}, not an object"
    except json.JSONDecodeError as exc:
        problem = f"{exc.msg} at character {exc.pos}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError:
        problem = "a number with too many digits"
    return Entry(
        Kind.UNREADABLE,
        status=problem,
        parts=texts(string(raw[:UNREADABLE_LENGTH]), PartKind.CODE),
    )


def _unknown(kind: str, item: Item) -> Fields:
    return {"parts": (json_part(dict(item)),)}


def _message(kind: str, item: Item) -> Fields:
    role = string(item.get("role"))
    return {
        "kind": Kind.SYSTEM if role in {"system", "developer"} else Kind.MESSAGE,
        "role": role,
        "parts": content_parts(item.get("content")),
        **({"status": "stopped"} if ended_early(item) else {}),
    }


def _settings(kind: str, item: Item) -> Fields:
    rest = {key: item[key] for key in item if key not in {"type", "role", "id"}}
    return {
        "role": string(item.get("role")) or "system",
        "name": kind,
        "parts": maybe_json(rest),
    }


def _list_tools(kind: str, item: Item) -> Fields:
    names = [string(tool.get("name")) for tool in objects(item.get("tools"))]
    return {
        "role": "system",
        "name": kind,
        "server": string(item.get("server_label")),
        "parts": (
            *texts("\n".join(filter(None, names))),
            *maybe_json(item.get("error")),
        ),
    }


def _reasoning(kind: str, item: Item) -> Fields:
    return {
        "parts": (
            *content_parts(listed(item.get("summary"))),
            *content_parts(listed(item.get("content"))),
            *encrypted_parts(item.get("encrypted_content")),
        )
    }


def _call(kind: str, item: Item) -> Fields:
    keys = KINDS[kind].given
    given = {key: item[key] for key in keys if item.get(key) not in (None, [])}
    # One argument alone needs no name.
    value = next(iter(given.values())) if len(keys) == 1 and given else given
    result = _RESULTS.get(kind)
    return {
        "name": string(item.get("name")) or KINDS[kind].tool or kind,
        "server": string(item.get("server_label")) or string(item.get("namespace")),
        "call_id": string(item.get("call_id")) or _id(item),
        "arguments": maybe_json(value),
        "parts": result(item) if result else (),
    }


def _output(kind: str, item: Item) -> Fields:
    return {
        "name": string(item.get("name")),
        "call_id": string(item.get("call_id")) or _id(item),
        "parts": (
            *_output_parts(item),
            *maybe_json(item.get("acknowledged_safety_checks"), "acknowledged"),
        ),
        "handoff": handoff_target(item.get("output")),
    }


def _output_parts(item: Item) -> tuple[Part, ...]:
    for key in ("output", "result"):
        value = item.get(key)
        if isinstance(value, str):
            return texts(value)
        if value is not None:
            return content_parts(value)
    return maybe_json(item.get("tools"))


def _mcp_result(item: Item) -> tuple[Part, ...]:
    return (*texts(item.get("output")), *maybe_json(item.get("error"), "error"))


def _code_result(item: Item) -> tuple[Part, ...]:
    parts: list[Part] = []
    for output in objects(item.get("outputs")):
        if output.get("type") == "image":
            parts.append(image_part(output.get("url"), output))
        else:
            parts += texts(output.get("logs"))
    return tuple(parts)


def _web_result(item: Item) -> tuple[Part, ...]:
    action = item.get("action")
    sources = action.get("sources") if isinstance(action, dict) else None
    return tuple(link_part(source.get("url")) for source in objects(sources))


def _file_result(item: Item) -> tuple[Part, ...]:
    return tuple(
        text_part(string(found.get("text")), label=string(found.get("filename")))
        for found in objects(item.get("results"))
    )


def _image_result(item: Item) -> tuple[Part, ...]:
    result = item.get("result")
    if not isinstance(result, str) or not result:
        return maybe_json(item.get("error"), "error")
    form = string(item.get("output_format")) or "png"
    return (image_part(f"data:image/{form};base64,{result}", item),)


def _approval(kind: str, item: Item) -> Fields:
    if kind == "mcp_approval_request":
        status = "asked"
    else:
        status = "approved" if item.get("approve") is True else "refused"
    return {
        "name": string(item.get("name")),
        "server": string(item.get("server_label")),
        "call_id": string(item.get("approval_request_id")) or _id(item),
        "status": status,
        "arguments": maybe_json(item.get("arguments")),
        "parts": texts(item.get("reason")),
    }


def _marker(kind: str, item: Item) -> Fields:
    return {"parts": encrypted_parts(item.get("encrypted_content"))}


def _id(item: Item) -> str:
    return string(item.get("id"))


_RESULTS: dict[str, Callable[[Item], tuple[Part, ...]]] = {
    "mcp_call": _mcp_result,
    "code_interpreter_call": _code_result,
    "web_search_call": _web_result,
    "file_search_call": _file_result,
    "image_generation_call": _image_result,
}
_READERS: dict[Family, tuple[Kind, Callable[[str, Item], Fields]]] = {
    Family.MESSAGE: (Kind.MESSAGE, _message),
    Family.REASONING: (Kind.REASONING, _reasoning),
    Family.CALL: (Kind.CALL, _call),
    Family.OUTPUT: (Kind.OUTPUT, _output),
    Family.APPROVAL: (Kind.APPROVAL, _approval),
    Family.SETTING: (Kind.SYSTEM, _settings),
    Family.MARKER: (Kind.MARKER, _marker),
}


IDLE_GAP = timedelta(minutes=5)
# Characters of images that one page carries; the rest are linked.
IMAGES_LENGTH = 4_000_000
# Characters of texts that one page carries, and what is left of those after them.
TEXTS_LENGTH = 1_000_000
REST_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Line:
    """An entry in its place.

    `output` is the call's own, if it lies on the same page. `idle_since` is set where
    nothing happened for a while before. `handoff` names the agent that took over.
    """

    position: int
    turn: int
    created_at: datetime
    entry: Entry
    output: Entry | None = None
    output_position: int | None = None
    idle_since: datetime | None = None
    handoff: str = ""


def join(stored: Iterable[StoredItem]) -> list[Line]:
    """Turn a page of a history, oldest first, into what is shown."""
    lines: list[Line] = []
    calls: dict[str, int] = {}
    previous: datetime | None = None
    budget = _Budget()
    for row in stored:
        entry = budget.fit(parse(row.item, row.raw))
        gap = previous is not None and row.created_at - previous > IDLE_GAP
        since = previous if gap else None
        previous = row.created_at
        if entry.kind is Kind.OUTPUT and entry.call_id in calls:
            index = calls.pop(entry.call_id)
            lines[index] = _answered(lines[index], entry, row.position)
            continue
        if entry.kind is Kind.CALL and entry.call_id:
            calls[entry.call_id] = len(lines)
        lines.append(
            Line(row.position, row.turn, row.created_at, entry, idle_since=since)
        )
    return lines


def _answered(call: Line, output: Entry, position: int) -> Line:
    is_handoff = (
        call.entry.type == "function_call"
        and call.entry.name.startswith(HANDOFF_PREFIX)
        and output.type == "function_call_output"
    )
    return replace(
        call,
        output=output,
        output_position=position,
        handoff=output.handoff if is_handoff else "",
    )


class _Budget:
    """Limit the images and texts of a page."""

    def __init__(self) -> None:
        self._images = 0
        self._texts = 0

    def fit(self, entry: Entry) -> Entry:
        return replace(
            entry,
            arguments=tuple(map(self._fit, entry.arguments)),
            parts=tuple(map(self._fit, entry.parts)),
        )

    def _fit(self, part: Part) -> Part:
        self._images += len(part.src)
        if part.src and self._images > IMAGES_LENGTH:
            part = replace(part, kind=PartKind.IMAGE_LINK, src="")
        self._texts += len(part.text)
        if self._texts > TEXTS_LENGTH and len(part.text) > REST_LENGTH:
            size = part.size or len(part.text)
            part = replace(part, text=cut_whole(part.text, REST_LENGTH), size=size)
        return part
