"""The table of item types, held against the installed SDK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.responses import ResponseInputItemParam, ResponseOutputItem

from agent_sessions.items.kinds import (
    CALL_OF,
    CALLS,
    KINDS,
    ROLES,
    is_in_response,
    opens_turn,
)


def literals(hint: Any) -> Iterator[str]:
    """Return the texts of a Literal, wherever it stands in a type."""
    for part in get_args(hint):
        if isinstance(part, str):
            yield part
        else:
            yield from literals(part)


def inputs() -> dict[str, list[dict[str, Any]]]:
    """Return the fields of the SDK's input items by their type."""
    found: dict[str, list[dict[str, Any]]] = {}
    for member in get_args(ResponseInputItemParam):
        fields = get_type_hints(member)
        for name in literals(fields["type"]):
            found.setdefault(name, []).append(fields)
    return found


INPUTS = inputs()


def test_every_type_of_the_sdk_is_known_and_no_other() -> None:
    assert INPUTS.keys() == KINDS.keys()


def test_every_role_of_the_sdk_is_known() -> None:
    roles = [f["role"] for fields in INPUTS.values() for f in fields if "role" in f]
    assert {role for hint in roles for role in literals(hint)} == ROLES


def test_every_output_of_the_sdk_answers_a_call() -> None:
    outputs = {name for name in INPUTS if name.endswith(("_output", "_response"))}
    assert outputs == CALL_OF.keys()
    assert set(CALL_OF.values()) - {"mcp_approval_request"} <= CALLS


@pytest.mark.parametrize("name", KINDS)
def test_the_sdk_has_the_fields_that_are_read(name: str) -> None:
    kind = KINDS[name]
    fields = {field for each in INPUTS[name] for field in each}
    # Stored runs of older SDKs have the revised prompt.
    assert set(kind.given) - fields <= {"revised_prompt"}
    assert not kind.gave or kind.gave in fields


def test_what_a_model_returns_stands_in_its_response() -> None:
    # What the app returns, in a request of its own.
    from_the_app = {
        "function_call_output",
        "custom_tool_call_output",
        "computer_call_output",
        "local_shell_call_output",
        "mcp_approval_response",
    }
    returned = {
        name
        for model in get_args(get_args(ResponseOutputItem)[0])
        for name in literals(model.model_fields["type"].annotation)
    }
    found = {n for n in KINDS if is_in_response({"type": n, "role": "assistant"})}
    assert returned - from_the_app == found


@pytest.mark.parametrize("name", KINDS)
def test_only_a_message_of_the_user_opens_a_turn(name: str) -> None:
    for role in ROLES:
        expected = (name, role) == ("message", "user")
        assert opens_turn({"type": name, "role": role}) is expected
    assert opens_turn({"role": "user"})
    assert not opens_turn({"type": name})
