"""The types of the SDK's items: what each is, what it answers, what opens a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from agent_sessions.items.text import column

# A call's type with the id by which its output names it.
Key = tuple[str, str | None]


class Family(Enum):
    """What an item of some type is."""

    MESSAGE = "message"
    REASONING = "reasoning"
    CALL = "call"
    OUTPUT = "output"
    APPROVAL = "approval"
    SETTING = "setting"
    MARKER = "marker"


class Kind(NamedTuple):
    """What is known of a type of items.

    `answers` is the type of the call that an output belongs to. `tool` names the tool
    of calls that have no name of their own. `given` are the fields with what the tool
    was given, `gave` is the field with what came back; where that is a list of
    results, `texts` are their fields that hold text. An item `in_response` may stand
    within a model's response. Calls that are `answered_here` get their output from
    the app; the provider's own tools need none.
    """

    family: Family
    answers: str = ""
    tool: str = ""
    given: tuple[str, ...] = ()
    gave: str = ""
    texts: tuple[str, ...] = ()
    in_response: bool = False
    answered_here: bool = False


def _call(*given: str, tool: str = "", here: bool = False) -> Kind:
    return Kind(
        Family.CALL, tool=tool, given=given, in_response=True, answered_here=here
    )


def _output(
    answers: str, gave: str = "output", *texts: str, hosted: bool = False
) -> Kind:
    return Kind(Family.OUTPUT, answers, gave=gave, texts=texts, in_response=hosted)


# The outputs of shell and apply_patch stand within a response where the provider runs
# the tool. That of the app's own shell joins two responses, which harms nothing: no
# user's message is between them. A computer's output is a screenshot and no text, and
# found tools are no text either.
KINDS = {
    "message": Kind(Family.MESSAGE),
    "reasoning": Kind(Family.REASONING, in_response=True),
    "function_call": _call("arguments", here=True),
    "custom_tool_call": _call("input", here=True),
    "computer_call": _call(
        "action", "actions", "pending_safety_checks", tool="computer", here=True
    ),
    "shell_call": _call("action", tool="shell", here=True),
    "local_shell_call": _call("action", tool="local_shell", here=True),
    "apply_patch_call": _call("operation", tool="apply_patch", here=True),
    "tool_search_call": _call("arguments", tool="tool_search"),
    "web_search_call": _call("action", tool="web_search"),
    "image_generation_call": _call("revised_prompt", tool="image_generation"),
    "program": _call("code", tool="program"),
    "mcp_call": _call("arguments")._replace(gave="output"),
    "file_search_call": _call("queries", tool="file_search")._replace(
        gave="results", texts=("text",)
    ),
    "code_interpreter_call": _call("code", tool="code_interpreter")._replace(
        gave="outputs", texts=("logs",)
    ),
    "function_call_output": _output("function_call"),
    "custom_tool_call_output": _output("custom_tool_call"),
    "computer_call_output": _output("computer_call", ""),
    "shell_call_output": _output(
        "shell_call", "output", "stdout", "stderr", hosted=True
    ),
    "local_shell_call_output": _output("local_shell_call"),
    "apply_patch_call_output": _output("apply_patch_call", hosted=True),
    "tool_search_output": _output("tool_search_call", "", hosted=True),
    "program_output": _output("program", "result", hosted=True),
    "mcp_approval_request": Kind(Family.APPROVAL, in_response=True),
    "mcp_approval_response": Kind(Family.APPROVAL, "mcp_approval_request"),
    "mcp_list_tools": Kind(Family.SETTING, in_response=True),
    "additional_tools": Kind(Family.SETTING, in_response=True),
    "configuration_update": Kind(Family.SETTING),
    "compaction": Kind(Family.MARKER, in_response=True),
    "compaction_trigger": Kind(Family.MARKER),
    "item_reference": Kind(Family.MARKER),
}

CALLS = frozenset(t for t, kind in KINDS.items() if kind.family is Family.CALL)
OUTPUTS = frozenset(t for t, kind in KINDS.items() if kind.family is Family.OUTPUT)
# An output that has lost its call is refused by every model, so it is never sent.
CALL_OF = {name: kind.answers for name, kind in KINDS.items() if kind.answers}

INSTRUCTIONS = frozenset({"system", "developer"})
ROLES = frozenset({"user", "assistant", *INSTRUCTIONS})

# The SDK names a handoff's call so, unless the agent gives another name.
HANDOFF_PREFIX = "transfer_to_"

# On words of an answer that ended early: it was stopped, or failed. The SDK takes this
# field off every item that it sends to a model.
ENDED_EARLY = {"created_by": "agent_sessions:stopped"}

# The columns of a row that opens a turn, as a filter takes them.
OPENING = {"type": "message", "role": "user"}


def type_and_role(item: Mapping[str, Any]) -> tuple[str, str]:
    """Return an item's type and role; the SDK leaves out the type of easy messages."""
    role = column(item.get("role"))
    return column(item.get("type")) or ("message" if role else ""), role


def opens_turn(item: Mapping[str, Any]) -> bool:
    """Return whether an item opens a turn: a message of the user."""
    return is_opening(*type_and_role(item))


def is_opening(type: str, role: str) -> bool:
    """Return whether a row with these columns opens a turn."""
    return type == "message" and role == "user"


def is_in_response(item: Mapping[str, Any]) -> bool:
    """Return whether an item may stand within a model's response."""
    name, role = type_and_role(item)
    if name == "message":
        return role == "assistant"
    # A call of a type that is not known yet is one too.
    known = KINDS.get(name)
    return name.endswith("_call") if known is None else known.in_response


def own_key(item: Mapping[str, Any]) -> Key:
    """Return the key by which an output names this item."""
    name, _ = type_and_role(item)
    return name, _text(item, "id" if name == "mcp_approval_request" else "call_id")


def call_key(output: Mapping[str, Any]) -> Key:
    """Return the key of the call that an output answers."""
    name, _ = type_and_role(output)
    if name == "mcp_approval_response":
        return CALL_OF[name], _text(output, "approval_request_id")
    call_id = _text(output, "call_id")
    # The API's own local shell output has the call's id as its `id`.
    if call_id is None and name == "local_shell_call_output":
        call_id = _text(output, "id")
    return CALL_OF[name], call_id


def causes(item: Mapping[str, Any]) -> list[Key]:
    """Return the keys of what made a call: a program, or an approval that was asked."""
    found: list[Key] = []
    caller = item.get("caller")
    if isinstance(caller, dict) and caller.get("type") == "program":
        found.append(("program", _text(caller, "caller_id")))
    if item.get("type") == "mcp_call" and item.get("approval_request_id"):
        found.append(("mcp_approval_request", _text(item, "approval_request_id")))
    return found


def handoff_target(output: Any) -> str:
    """Return the agent that a handoff's output names, if that is all that it says."""
    if not isinstance(output, str) or not output.startswith("{"):
        return ""
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, dict) and value.keys() == {"assistant"}:
        return column(value["assistant"])
    return ""


def tool_name(item: Mapping[str, Any], type: str) -> str:
    """Name the tool that an item calls, with its server or namespace; "" for none."""
    if type == "message":
        return ""
    if type in {"tool_search_call", "tool_search_output"}:
        return "tool_search"
    name = column(item.get("name"))
    if type.startswith("mcp_"):
        parts = (column(item.get("server_label")), name)
    elif type in _NAMED_BY_TYPE:
        return type
    else:
        namespace = column(item.get("namespace"))
        # The SDK gives some tools their own name as namespace.
        parts = (namespace if name and namespace != name else "", name)
    return ".".join(part for part in parts if part)


# As AdvancedSQLiteSession names them.
_NAMED_BY_TYPE = frozenset(t for t in CALLS - {"program"} if KINDS[t].tool)


def _text(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    return value if isinstance(value, str) else None


def ended_early(item: Mapping[str, Any]) -> bool:
    """Return whether an item is what an answer had said when it ended early."""
    return ENDED_EARLY.items() <= item.items()
