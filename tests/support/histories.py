"""Items of every kind that a history has, made short for the tests of its windows."""

from __future__ import annotations

from typing import Any

Item = dict[str, Any]


def user(text: str) -> Item:
    return {"role": "user", "content": text}


def system(text: str, role: str = "system") -> Item:
    return {"role": role, "content": text}


def says(text: str) -> Item:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {
        "type": "message",
        "role": "assistant",
        "id": f"msg_{text}",
        "status": "completed",
        "content": content,
    }


def thinks(name: str) -> Item:
    return {"type": "reasoning", "id": f"rs_{name}", "summary": []}


def calls(call_id: str | None, name: str = "look", **more: Any) -> Item:
    return {
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": "{}",
        **more,
    }


def gives(call_id: str | None, output: Any = "found", **more: Any) -> Item:
    return {
        "type": "function_call_output",
        "call_id": call_id,
        "output": output,
        **more,
    }


def pair(kind: str, call_id: str | None, output: str = "") -> tuple[Item, Item]:
    """Return a call and its output of a kind of tool."""
    call: Item = {"type": kind, "call_id": call_id}
    answer: Item = {"type": output or f"{kind}_output", "call_id": call_id}
    return call, answer


def approval(request_id: str) -> tuple[Item, Item, Item]:
    """Return a request of a hosted MCP tool, the answer and the call that it allowed."""
    return (
        {"type": "mcp_approval_request", "id": request_id, "name": "delete"},
        {
            "type": "mcp_approval_response",
            "approval_request_id": request_id,
            "approve": True,
        },
        {
            "type": "mcp_call",
            "id": f"mcp_{request_id}",
            "name": "delete",
            "approval_request_id": request_id,
            "output": "deleted",
        },
    )


PAIRS: dict[str, tuple[Item, Item]] = {
    "function": (calls("c"), gives("c")),
    "custom": pair("custom_tool_call", "c"),
    "shell": pair("shell_call", "c"),
    "apply_patch": pair("apply_patch_call", "c"),
    "computer": pair("computer_call", "c"),
    "local_shell": pair("local_shell_call", "c"),
    "local_shell_of_the_api": (
        {"type": "local_shell_call", "call_id": "c", "id": "lsh_1"},
        {"type": "local_shell_call_output", "id": "c", "output": ""},
    ),
    "tool_search": pair("tool_search_call", "c", "tool_search_output"),
    "anonymous_tool_search": pair("tool_search_call", None, "tool_search_output"),
    "program": pair("program", "c", "program_output"),
    "program_and_its_call": (
        {"type": "program", "call_id": "p"},
        calls("c", caller={"type": "program", "caller_id": "p"}),
    ),
    "approval": approval("r")[:2],
    "approved_call": approval("r")[::2],
}
