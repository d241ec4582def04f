"""Stored items as AG-UI messages."""

from __future__ import annotations

from typing import Any

import pytest

from agent_sessions.agui import StreamOptions, messages_from_items, snapshot
from tests.support.agui_runs import FULL, Stored, stored
from tests.support.agui_validator import validate_event

NAMES = StreamOptions()
NONE = StreamOptions(expose_tools="none")
REAL_ID = "msg_67ccd2bf17f0819081ff3bb2cf6508e6"


def messages(
    *items: dict[str, Any] | None, options: StreamOptions = FULL
) -> list[dict[str, Any]]:
    made = messages_from_items(stored(list(items)), options)
    validate_event(snapshot(made))
    ids = [message["id"] for message in made]
    assert len(set(ids)) == len(ids)
    return made


def call(**extra: Any) -> dict[str, Any]:
    return {
        "type": "function_call",
        "call_id": "call_1",
        "name": "add",
        "arguments": '{"a":1}',
        **extra,
    }


def output(value: Any, kind: str = "function_call_output") -> dict[str, Any]:
    return {"type": kind, "call_id": "call_1", "output": value}


def test_a_user_message_keeps_its_text() -> None:
    assert messages({"role": "user", "content": "Hi"}) == [
        {"id": "item-0", "role": "user", "content": "Hi"}
    ]
    texts = [{"type": "input_text", "text": text} for text in ("One", "Two")]
    [message] = messages({"role": "user", "content": texts})
    assert message["content"] == "One\nTwo"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
            {
                "type": "image",
                "source": {"type": "data", "value": "AAAA", "mimeType": "image/png"},
            },
        ),
        (
            {"type": "input_image", "image_url": "https://example.com/a.png"},
            {
                "type": "image",
                "source": {"type": "url", "value": "https://example.com/a.png"},
            },
        ),
        (
            {"type": "input_image", "file_id": "file_1"},
            {
                "type": "image",
                "source": {"type": "file", "value": "file_1", "provider": "openai"},
            },
        ),
        (
            {"type": "input_file", "file_url": "https://example.com/a.pdf"},
            {
                "type": "document",
                "source": {"type": "url", "value": "https://example.com/a.pdf"},
            },
        ),
    ],
)
def test_media_are_parts(part: dict[str, Any], expected: dict[str, Any]) -> None:
    text = {"type": "input_text", "text": "See"}
    [message] = messages({"role": "user", "content": [text, part, {"type": "new"}]})
    assert message["content"] == [{"type": "text", "text": "See"}, expected]


@pytest.mark.parametrize(
    ("part", "note"),
    [
        ({"type": "input_image", "image_url": "javascript:alert(1)"}, "[image]"),
        ({"type": "input_image", "image_url": "data:image/svg+xml,<svg/>"}, "[image]"),
        (
            {
                "type": "input_image",
                "image_url": "data:image/png;base64," + "A" * 300_000,
            },
            "[image]",
        ),
        ({"type": "input_file", "filename": "a.pdf"}, "a.pdf"),
        ({"type": "input_file"}, "[file]"),
        ({"type": "input_audio", "transcript": "Hello"}, "Hello"),
        ({"type": "input_audio", "input_audio": {"data": "aGk="}}, "[audio]"),
    ],
)
def test_media_that_can_not_be_shown_leave_a_note(
    part: dict[str, Any], note: str
) -> None:
    assert messages({"role": "user", "content": [part]})[0]["content"] == note


def test_an_assistant_message_joins_its_parts_as_the_stream_does() -> None:
    parts = [{"type": "output_text", "text": text} for text in ("One", "Two")]
    item = {"type": "message", "role": "assistant", "id": REAL_ID, "content": parts}
    assert messages(item) == [{"id": REAL_ID, "role": "assistant", "content": "OneTwo"}]
    [message] = messages({"role": "assistant", "content": "Easy"})
    assert message["content"] == "Easy"


def test_a_refusal_says_so() -> None:
    part = {"type": "refusal", "refusal": "No"}
    [message] = messages({"role": "assistant", "content": [part]})
    assert message["content"] == "No"
    assert message["metadata"] == {"refusal": True}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_are_shown_only_where_wanted(role: str) -> None:
    item = {"role": role, "content": "Be brief"}
    assert messages(item) == []
    shown = StreamOptions(expose_instructions=True)
    assert messages(item, options=shown) == [
        {"id": "item-0", "role": role, "content": "Be brief"}
    ]
    parts = [{"type": "input_text", "text": text} for text in ("Be", "brief")]
    [message] = messages({"role": role, "content": parts}, options=shown)
    assert message["content"] == "Be\nbrief"


def test_a_call_and_its_output_are_two_messages() -> None:
    assert messages(call(), output("3")) == [
        {
            "id": "call_1",
            "role": "assistant",
            "toolCalls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a":1}'},
                }
            ],
        },
        {
            "id": "call_1:result",
            "role": "tool",
            "toolCallId": "call_1",
            "content": "3",
        },
    ]


def test_a_pending_call_has_no_output() -> None:
    assert [message["role"] for message in messages(call())] == ["assistant"]


def test_exposure_holds_in_snapshots() -> None:
    shown, result = messages(call(), output("3"), options=NAMES)
    assert shown["toolCalls"][0]["function"] == {"name": "add", "arguments": ""}
    assert result["content"] == ""
    assert result["metadata"] == {"withheld": True}
    assert messages(call(), output("3"), options=NONE) == []


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (output("plain"), "plain"),
        (
            output([{"type": "input_text", "text": "a"}, {"type": "input_image"}]),
            "a\n[image]",
        ),
        (output([{"type": "input_file", "filename": "a.pdf"}, "b", 3]), "a.pdf\nb\n3"),
        (output([{"type": "input_file"}]), "[file]"),
        (output({"type": "computer_screenshot"}, "computer_call_output"), "[image]"),
        (output([{"stdout": "out", "stderr": "err"}], "shell_call_output"), "out\nerr"),
        (output("patched", "apply_patch_call_output"), "patched"),
        (output("done", "local_shell_call_output"), "done"),
        (output("made", "custom_tool_call_output"), "made"),
        (output({"odd": True}), '{"odd": true}'),
        (output(None), ""),
        ({"type": "program_output", "call_id": "call_1", "result": "7"}, "7"),
    ],
)
def test_outputs_of_every_kind_are_text(item: dict[str, Any], expected: str) -> None:
    [message] = messages(item)
    assert message["content"] == expected


@pytest.mark.parametrize(
    ("item", "name", "arguments", "result"),
    [
        (
            {
                "type": "file_search_call",
                "queries": ["x"],
                "results": [{"filename": "a.md"}, {"text": "no name"}, 1],
            },
            "file_search",
            '{"queries": ["x"]}',
            "a.md",
        ),
        ({"type": "file_search_call"}, "file_search", '{"queries": null}', ""),
        (
            {
                "type": "code_interpreter_call",
                "code": "1+1",
                "outputs": [{"type": "logs", "logs": "2"}, {"type": "image"}],
            },
            "code_interpreter",
            '{"code": "1+1"}',
            "2\n[image]",
        ),
        (
            {"type": "image_generation_call", "revised_prompt": "cat", "result": "AA"},
            "image_generation",
            '{"prompt": "cat"}',
            "[image]",
        ),
        ({"type": "image_generation_call"}, "image_generation", "{}", ""),
        ({"type": "web_search_call", "action": None}, "web_search", "{}", ""),
        (
            {"type": "mcp_call", "name": "ask", "arguments": {"q": 1}, "output": "42"},
            "ask",
            '{"q": 1}',
            "42",
        ),
    ],
)
def test_hosted_calls_bring_their_result(
    item: dict[str, Any], name: str, arguments: str, result: str
) -> None:
    shown, answer = messages({"id": "call_9", **item})
    assert shown["toolCalls"][0]["function"] == {"name": name, "arguments": arguments}
    assert answer["toolCallId"] == "call_9"
    assert answer["content"] == result


@pytest.mark.parametrize(
    ("item", "name", "arguments"),
    [
        (
            {"type": "computer_call", "action": {"type": "wait"}},
            "computer",
            '{"action": {"type": "wait"}}',
        ),
        (
            {"type": "local_shell_call", "action": {"command": ["ls"]}},
            "local_shell",
            '{"action": {"command": ["ls"]}}',
        ),
        (
            {"type": "shell_call", "action": {"commands": ["ls"]}},
            "shell",
            '{"action": {"commands": ["ls"]}}',
        ),
        (
            {"type": "apply_patch_call", "operation": {"path": "a"}},
            "apply_patch",
            '{"operation": {"path": "a"}}',
        ),
        ({"type": "program", "code": "x"}, "program", '{"code": "x"}'),
        (
            {"type": "custom_tool_call", "name": "sql", "input": "x"},
            "sql",
            '{"input": "x"}',
        ),
        ({"type": "function_call"}, "tool", ""),
    ],
)
def test_local_calls_wait_for_their_output(
    item: dict[str, Any], name: str, arguments: str
) -> None:
    [shown] = messages({"call_id": "call_9", **item})
    assert shown["toolCalls"][0]["function"] == {"name": name, "arguments": arguments}


def test_a_handoff_stands_where_its_call_was() -> None:
    handoff = call(name="transfer_to_billing", arguments="{}")
    activity = {
        "id": "item-1",
        "role": "activity",
        "activityType": "agent_sessions:handoff",
        "content": {"to": "Billing"},
    }
    for options in (FULL, NAMES, NONE):
        made = messages(handoff, output('{"assistant": "Billing"}'), options=options)
        assert made == [activity]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add", '{"assistant": "Billing"}'),
        ("transfer_to_billing", "Multiple handoffs detected, ignoring this one."),
        ("transfer_to_billing", '{"assistant": 3}'),
        ("transfer_to_billing", '{"assistant": "B", "more": 1}'),
        ("transfer_to_billing", "[" * 100_000),
        ("transfer_to_billing", [{"type": "input_text", "text": "x"}]),
    ],
)
def test_other_outputs_are_no_handoff(name: str, value: Any) -> None:
    assert [m["role"] for m in messages(call(name=name), output(value))] == [
        "assistant",
        "tool",
    ]


def test_reasoning_is_shown_on_wish_and_its_secret_never() -> None:
    item = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "Hm"}],
        "encrypted_content": "SECRET",
    }
    assert messages(item) == [{"id": "item-0", "role": "reasoning", "content": "Hm"}]
    assert messages(item, options=NAMES) == []
    assert messages({**item, "summary": []}) == []


def test_what_is_no_message_is_passed_over() -> None:
    assert messages(
        None,
        {},
        {"type": "compaction", "encrypted_content": "SECRET"},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "mcp_list_tools", "id": "x", "tools": []},
        {"type": "mcp_approval_request", "id": "x", "name": "x", "arguments": "{}"},
        {"type": "tool_search_call", "id": "x"},
        {"type": "of_the_future", "id": "x"},
        {"type": ["odd"]},
        {"type": "function_call", "name": "add"},
        {"type": "function_call_output", "output": "x"},
        {"role": "critic", "content": "x"},
        {"role": "user", "content": None},
    ) == [{"id": "item-12", "role": "user", "content": ""}]


def test_ids_do_not_depend_on_the_page() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "id": "scripted-message", "content": "One"},
        call(),
        output("3"),
        {"role": "assistant", "id": "scripted-message", "content": "Two"},
        {"role": "assistant", "id": REAL_ID, "content": "Three"},
    ]
    whole = messages_from_items(stored(items), FULL)
    for start in range(len(items)):
        page = [Stored(n, items[n]) for n in range(start, len(items))]
        assert messages_from_items(page, FULL) == whole[start:]


def test_of_two_equal_calls_each_message_has_an_id_of_its_own() -> None:
    item = {"type": "mcp_call", "id": "mcp_1", "name": "ask", "output": "42"}
    assert [message["id"] for message in messages(item, item)] == [
        "mcp_1",
        "mcp_1:result",
        "item-1",
        "item-1.2",
    ]


def test_an_output_nested_too_deeply_is_shown_empty() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    [message] = messages(output([deep]))
    assert message["content"] == ""
