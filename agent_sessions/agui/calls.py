"""Tool calls and their outputs, of any kind, and the approvals that calls wait for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent_sessions.agui.content import (
    IMAGE_NOTE,
    StreamOptions,
    as_dict,
    clean,
    cut,
    dumps,
    string,
)
from agent_sessions.items.kinds import CALL_OF, KINDS, OUTPUTS, Kind

HANDOFF = "agent_sessions:handoff"


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; `result` is None where the output comes as an item of its own."""

    id: str
    name: str
    arguments: str
    result: str | None = None


def read_call(item: Mapping[str, Any]) -> Call | None:
    """Return a tool call of any kind; None for other items and calls without an id."""
    read = _READERS.get(string(item.get("type")))
    if read is None:
        return None
    call_id = string(item.get("call_id")) or string(item.get("id"))
    return read(call_id, item) if call_id else None


def output_call_id(item: Mapping[str, Any]) -> str:
    """Return the id of the call that an output answers."""
    return string(item.get("call_id")) or string(item.get("id"))


def exposed_arguments(call: Call, options: StreamOptions) -> str:
    """Return the arguments that a reader may see."""
    return call.arguments if options.expose_tools == "full" else ""


def exposed_result(text: str, options: StreamOptions) -> dict[str, Any]:
    """Return the `content` of a result, and `metadata` where it isn't the whole."""
    if options.expose_tools != "full":
        return {"content": "", "metadata": {"withheld": True}}
    content, was_cut = cut(text, options.result_limit)
    if was_cut:
        return {"content": content, "metadata": {"truncated": True}}
    return {"content": content}


def _function(call_id: str, item: Mapping[str, Any]) -> Call:
    return Call(call_id, _name(item), _arguments(item))


def _custom(call_id: str, item: Mapping[str, Any]) -> Call:
    return Call(call_id, _name(item), dumps({"input": item.get("input")}))


def _mcp(call_id: str, item: Mapping[str, Any]) -> Call:
    output, error = item.get("output"), item.get("error")
    if isinstance(output, str) or error is None:
        result = string(output)
    else:
        result = string(error) or dumps(error)
    return Call(call_id, _name(item), _arguments(item), result)


def _web_search(call_id: str, item: Mapping[str, Any]) -> Call:
    action = item.get("action")
    action = action if isinstance(action, Mapping) else {}
    sources = action.get("sources")
    urls = [
        string(source.get("url"))
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, Mapping)
    ]
    arguments = {
        key: value for key, value in action.items() if key not in ("type", "sources")
    }
    return Call(call_id, "web_search", dumps(arguments), "\n".join(urls))


def _file_search(call_id: str, item: Mapping[str, Any]) -> Call:
    results = item.get("results")
    names = [
        string(result.get("filename"))
        for result in (results if isinstance(results, list) else [])
        if isinstance(result, Mapping)
    ]
    arguments = dumps({"queries": item.get("queries")})
    return Call(call_id, "file_search", arguments, "\n".join(filter(None, names)))


def _code_interpreter(call_id: str, item: Mapping[str, Any]) -> Call:
    outputs = item.get("outputs")
    lines = [
        string(output.get("logs")) or IMAGE_NOTE
        for output in (outputs if isinstance(outputs, list) else [])
        if isinstance(output, Mapping)
    ]
    arguments = dumps({"code": item.get("code")})
    return Call(call_id, "code_interpreter", arguments, "\n".join(lines))


def _image_generation(call_id: str, item: Mapping[str, Any]) -> Call:
    prompt = item.get("revised_prompt")
    arguments = dumps({"prompt": prompt} if prompt else {})
    result = IMAGE_NOTE if item.get("result") else ""
    return Call(call_id, "image_generation", arguments, result)


def _local(kind: Kind) -> Callable[[str, Mapping[str, Any]], Call]:
    def read(call_id: str, item: Mapping[str, Any]) -> Call:
        arguments = {
            key: item[key] for key in kind.given if item.get(key) not in (None, [])
        }
        return Call(call_id, kind.tool, dumps(arguments))

    return read


def _arguments(item: Mapping[str, Any]) -> str:
    arguments = item.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return string(arguments)
    return dumps(arguments)


def _name(item: Mapping[str, Any]) -> str:
    return string(item.get("name")) or "tool"


_LOCAL = (
    "computer_call",
    "local_shell_call",
    "shell_call",
    "apply_patch_call",
    "program",
)
_READERS: dict[str, Callable[[str, Mapping[str, Any]], Call]] = {
    "function_call": _function,
    "custom_tool_call": _custom,
    "mcp_call": _mcp,
    "web_search_call": _web_search,
    "file_search_call": _file_search,
    "code_interpreter_call": _code_interpreter,
    "image_generation_call": _image_generation,
    **{name: _local(KINDS[name]) for name in _LOCAL},
}
# Of calls that are not shown, outputs are not either.
OUTPUT_TYPES = frozenset(name for name in OUTPUTS if CALL_OF[name] in _READERS)


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
        # The SDK knows the arguments of functions alone.
        call = None if item.arguments else read_call(as_dict(item.raw_item))
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
                    "arguments": call.arguments
                    if call
                    else clean(item.arguments or ""),
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
