"""Read the many kinds of tool calls and outputs as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_sessions.agui.content import IMAGE_NOTE, cut, dumps, string
from agent_sessions.agui.options import StreamOptions

OUTPUT_TYPES = frozenset(
    {
        "function_call_output",
        "custom_tool_call_output",
        "computer_call_output",
        "local_shell_call_output",
        "shell_call_output",
        "apply_patch_call_output",
        "program_output",
    }
)

HANDOFF = "agent_sessions:handoff"
HANDOFF_PREFIX = "transfer_to_"


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; `result` is None where the output comes as an item of its own."""

    id: str
    name: str
    arguments: str
    result: str | None = None


def read_call(item: Mapping[str, Any]) -> Call | None:
    """Read a tool call of any kind; None for an item that is none, or has no id."""
    read = _READERS.get(string(item.get("type")))
    if read is None:
        return None
    call_id = string(item.get("call_id")) or string(item.get("id"))
    return read(call_id, item) if call_id else None


def output_call_id(item: Mapping[str, Any]) -> str:
    """Return the id of the call that an output answers."""
    return string(item.get("call_id")) or string(item.get("id"))


def handoff_target(call_name: str, item: Mapping[str, Any]) -> str | None:
    """Return the agent that a stored output hands over to, if it is a handoff's."""
    output = item.get("output")
    if not call_name.startswith(HANDOFF_PREFIX) or not isinstance(output, str):
        return None
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and value.keys() == {"assistant"}:
        return string(value["assistant"]) or None
    return None


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


def _local(name: str, *keys: str) -> Callable[[str, Mapping[str, Any]], Call]:
    def read(call_id: str, item: Mapping[str, Any]) -> Call:
        arguments = {key: item[key] for key in keys if item.get(key) is not None}
        return Call(call_id, name, dumps(arguments))

    return read


def _arguments(item: Mapping[str, Any]) -> str:
    arguments = item.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return string(arguments)
    return dumps(arguments)


def _name(item: Mapping[str, Any]) -> str:
    return string(item.get("name")) or "tool"


_READERS: dict[str, Callable[[str, Mapping[str, Any]], Call]] = {
    "function_call": _function,
    "custom_tool_call": _custom,
    "mcp_call": _mcp,
    "web_search_call": _web_search,
    "file_search_call": _file_search,
    "code_interpreter_call": _code_interpreter,
    "image_generation_call": _image_generation,
    "computer_call": _local("computer", "action", "actions"),
    "local_shell_call": _local("local_shell", "action"),
    "shell_call": _local("shell", "action"),
    "apply_patch_call": _local("apply_patch", "operation"),
    "program": _local("program", "code"),
}
