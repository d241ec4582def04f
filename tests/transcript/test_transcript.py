"""The readable form of stored items: every kind, and anything else."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses.response_input_item_param import ResponseInputItemParam

from agent_sessions.items import StoredItem
from agent_sessions.transcript import Entry, Kind, PartKind, join, parse
from agent_sessions.transcript.parts import PART_LENGTH, PARTS

START = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def stored(*items: Any, step: timedelta = timedelta(seconds=1)) -> list[StoredItem]:
    return [
        StoredItem(position, 1, item, json.dumps(item), START + (position - 1) * step)
        for position, item in enumerate(items, start=1)
    ]


def texts(entry: Entry) -> list[str]:
    return [part.text for part in entry.parts]


KINDS: dict[str, tuple[dict[str, Any], Kind]] = {
    "message": ({"role": "user", "content": "Hi"}, Kind.MESSAGE),
    "file_search_call": ({"id": "fs", "queries": ["q"]}, Kind.CALL),
    "computer_call": ({"call_id": "c", "action": {"type": "click"}}, Kind.CALL),
    "computer_call_output": (
        {"call_id": "c", "output": {"type": "computer_screenshot", "image_url": PIXEL}},
        Kind.OUTPUT,
    ),
    "web_search_call": ({"id": "ws", "action": {"type": "search"}}, Kind.CALL),
    "function_call": ({"call_id": "c", "name": "f", "arguments": "{}"}, Kind.CALL),
    "function_call_output": ({"call_id": "c", "output": "1"}, Kind.OUTPUT),
    "tool_search_call": ({"call_id": "c", "arguments": {"q": 1}}, Kind.CALL),
    "tool_search_output": ({"call_id": "c", "tools": [{"name": "f"}]}, Kind.OUTPUT),
    "additional_tools": ({"role": "developer", "tools": [{"name": "f"}]}, Kind.SYSTEM),
    "configuration_update": ({"reasoning": {"effort": "low"}}, Kind.SYSTEM),
    "reasoning": ({"id": "r", "summary": []}, Kind.REASONING),
    "compaction": ({"encrypted_content": "xyz"}, Kind.MARKER),
    "image_generation_call": ({"id": "i", "result": "aGk="}, Kind.CALL),
    "code_interpreter_call": ({"id": "ci", "code": "1+1"}, Kind.CALL),
    "local_shell_call": ({"call_id": "c", "action": {"command": ["ls"]}}, Kind.CALL),
    "local_shell_call_output": ({"id": "c", "output": "a\nb"}, Kind.OUTPUT),
    "shell_call": ({"call_id": "c", "action": {"commands": ["ls"]}}, Kind.CALL),
    "shell_call_output": ({"call_id": "c", "output": [{"stdout": "a"}]}, Kind.OUTPUT),
    "apply_patch_call": ({"call_id": "c", "operation": {"diff": "+"}}, Kind.CALL),
    "apply_patch_call_output": ({"call_id": "c", "status": "failed"}, Kind.OUTPUT),
    "mcp_list_tools": ({"server_label": "s", "tools": [{"name": "f"}]}, Kind.SYSTEM),
    "mcp_approval_request": (
        {"id": "m", "name": "f", "arguments": "{}"},
        Kind.APPROVAL,
    ),
    "mcp_approval_response": (
        {"approval_request_id": "m", "approve": True},
        Kind.APPROVAL,
    ),
    "mcp_call": ({"id": "m", "name": "f", "arguments": "{}"}, Kind.CALL),
    "custom_tool_call": ({"call_id": "c", "name": "f", "input": "x"}, Kind.CALL),
    "custom_tool_call_output": ({"call_id": "c", "output": "x"}, Kind.OUTPUT),
    "compaction_trigger": ({}, Kind.MARKER),
    "item_reference": ({"id": "msg_1"}, Kind.MARKER),
    "program": ({"call_id": "c", "code": "f()"}, Kind.CALL),
    "program_output": ({"call_id": "c", "result": "x"}, Kind.OUTPUT),
}


def sdk_types() -> set[str]:
    """Name every type of input item that the SDK knows."""
    found: set[str] = set()
    for member in get_args(ResponseInputItemParam):
        hint = get_type_hints(member)["type"]
        literal = next((arg for arg in get_args(hint) if get_args(arg)), hint)
        found.update(get_args(literal))
    return found


def test_every_member_of_the_sdk_is_tested_here() -> None:
    assert sdk_types() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_known(name: str) -> None:
    item, kind = KINDS[name]
    entry = parse({"type": name, **item})
    assert entry.kind is kind
    assert entry.type == name


class TestMessages:
    def test_text_of_a_user(self) -> None:
        entry = parse({"role": "user", "content": "Hello\nthere"})
        assert (entry.kind, entry.role) == (Kind.MESSAGE, "user")
        assert texts(entry) == ["Hello\nthere"]
        assert entry.preview == "Hello there"

    def test_parts_of_an_assistant_in_their_order(self) -> None:
        entry = parse(
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "incomplete",
                "content": [
                    {
                        "type": "output_text",
                        "text": "See this",
                        "annotations": [
                            {
                                "type": "url_citation",
                                "url": "https://example.org/a",
                                "title": "A",
                            },
                            {"type": "file_citation", "file_id": "f1", "filename": "b"},
                            {"type": "other"},
                        ],
                    },
                    {"type": "refusal", "refusal": "No."},
                ],
            }
        )
        assert entry.status == "incomplete"
        assert [(part.kind, part.text, part.label) for part in entry.parts] == [
            (PartKind.TEXT, "See this", ""),
            (PartKind.LINK, "https://example.org/a", "A"),
            (PartKind.FILE, "f1", "b"),
            (PartKind.REFUSAL, "No.", ""),
        ]
        assert entry.parts[1].href == "https://example.org/a"

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_instructions_are_system(self, role: str) -> None:
        entry = parse({"role": role, "content": "Be kind. " * 40})
        assert entry.kind is Kind.SYSTEM
        assert len(entry.preview) == 121
        assert entry.preview.endswith("…")

    def test_long_texts_are_cut(self) -> None:
        (part,) = parse({"role": "user", "content": "x" * 50_000}).parts
        assert (len(part.text), part.size) == (PART_LENGTH, 50_000)

    def test_many_parts_are_counted(self) -> None:
        parts = [{"type": "input_text", "text": str(n)} for n in range(PARTS + 7)]
        entry = parse({"role": "user", "content": parts})
        assert len(entry.parts) == PARTS + 1
        assert (entry.parts[-1].kind, entry.parts[-1].size) == (PartKind.MORE, 7)

    def test_text_that_no_page_can_carry_is_replaced(self) -> None:
        entry = parse({"role": "user", "content": "a\x00b\ud800c"})
        assert texts(entry) == ["a\ufffdb?c"]


class TestOthers:
    def test_reasoning_shows_summaries_and_hides_what_is_encrypted(self) -> None:
        entry = parse(
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Thinking"}],
                "content": [{"type": "reasoning_text", "text": "hm"}],
                "encrypted_content": "c2VjcmV0",
            }
        )
        assert texts(entry) == ["Thinking", "hm", ""]
        assert (entry.parts[2].kind, entry.parts[2].size) == (PartKind.ENCRYPTED, 8)

    def test_envelopes_tell_key_and_size_only(self) -> None:
        entry = parse({"__enc__": 1, "v": 1, "kid": "k1", "payload": "gAAAA"})
        assert (entry.kind, entry.name, entry.parts[0].size) == (
            Kind.ENCRYPTED,
            "k1",
            5,
        )
        assert entry.parts[0].text == ""

    @pytest.mark.parametrize(
        ("raw", "problem"),
        [
            ('{"a": ', "Expecting value at character 6"),
            ("", "Expecting value at character 0"),
            ("[1]", "a JSON list, not an object"),
            ("[" * 100_000, "nested too deeply"),
            ("1" * 5_000, "a number with too many digits"),
        ],
    )
    def test_unreadable_rows_say_why(self, raw: str, problem: str) -> None:
        entry = parse(None, raw)
        assert entry.kind is Kind.UNREADABLE
        assert entry.status == problem
        assert texts(entry) == ([raw[:200]] if raw else [])

    def test_unknown_types_are_json(self) -> None:
        entry = parse({"type": "telepathy", "id": "t1", "to": ["you"]})
        assert (entry.kind, entry.type, entry.id) == (Kind.UNKNOWN, "telepathy", "t1")
        assert '"to": [' in entry.parts[0].text

    def test_a_lone_id_is_a_reference(self) -> None:
        assert parse({"id": "msg_1"}).kind is Kind.MARKER
        assert parse({}).kind is Kind.UNKNOWN

    def test_deep_values_are_cut(self) -> None:
        deep: Any = "end"
        for _ in range(900):
            deep = [deep]
        for _ in range(20_000):
            deep = {"in": deep}
        entry = parse({"type": "telepathy", "deep": deep})
        assert len(entry.parts[0].text) <= PART_LENGTH


class TestJoin:
    def test_an_output_goes_to_its_call(self) -> None:
        lines = join(
            stored(
                {"role": "user", "content": "Hi"},
                {"type": "function_call", "call_id": "a", "name": "f"},
                {"type": "function_call", "call_id": "b", "name": "g"},
                {"type": "function_call_output", "call_id": "b", "output": "2"},
                {"type": "function_call_output", "call_id": "a", "output": "1"},
            )
        )
        assert [line.position for line in lines] == [1, 2, 3]
        assert [line.output_position for line in lines] == [None, 5, 4]
        assert lines[1].output is not None
        assert texts(lines[1].output) == ["1"]

    def test_an_output_without_its_call_stands_alone(self) -> None:
        (line,) = join(stored({"type": "function_call_output", "call_id": "a"}))
        assert line.entry.kind is Kind.OUTPUT

    def test_a_second_output_stands_alone(self) -> None:
        output = {"type": "function_call_output", "call_id": "a", "output": "1"}
        call = {"type": "function_call", "call_id": "a", "name": "f"}
        assert len(join(stored(call, output, output))) == 2

    @pytest.mark.parametrize(
        ("name", "output", "handoff"),
        [
            ("transfer_to_billing", '{"assistant": "Billing"}', "Billing"),
            ("transfer_to_billing", '{"assistant": "Billing", "x": 1}', ""),
            ("transfer_to_billing", '{"assistant": 3}', ""),
            ("transfer_to_billing", "{broken", ""),
            ("look_up", '{"assistant": "Billing"}', ""),
        ],
    )
    def test_handoffs(self, name: str, output: str, handoff: str) -> None:
        (line,) = join(
            stored(
                {"type": "function_call", "call_id": "a", "name": name},
                {"type": "function_call_output", "call_id": "a", "output": output},
            )
        )
        assert line.handoff == handoff

    def test_a_long_silence_is_marked(self) -> None:
        message = {"role": "user", "content": "Hi"}
        calm = join(stored(message, message, step=timedelta(minutes=5)))
        idle = join(stored(message, message, step=timedelta(minutes=6)))
        assert [line.idle_since for line in calm] == [None, None]
        assert [line.idle_since for line in idle] == [None, START]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "role",
                    "content",
                    "text",
                    "output",
                    "summary",
                    "outputs",
                    "url",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(item=JSON)
def test_parse_is_total(item: Any) -> None:
    check_total(item)


@given(name=st.sampled_from(sorted(KINDS)), rest=st.data())
def test_parse_is_total_for_every_kind(name: str, rest: st.DataObject) -> None:
    keys = ["role", "content", *KINDS[name][0], "summary", "action", "outputs"]
    item = rest.draw(st.dictionaries(st.sampled_from(keys), JSON))
    check_total({"type": name, **item})


def check_total(item: Any) -> None:
    entry = parse(item, json.dumps(item))
    for part in (*entry.parts, *entry.arguments):
        f"{part.text}{part.label}{part.href}{part.src}".encode()
        assert part.kind in PartKind
        assert not part.href or part.href.lower().startswith(("http://", "https://"))
        assert not part.src or part.src.startswith("data:image/")
    f"{entry.name}{entry.call_id}{entry.status}{entry.role}{entry.handoff}".encode()
    assert isinstance(entry.preview, str)
    row = StoredItem(1, 0, item if isinstance(item, dict) else None, "", START)
    assert len(join([row])) == 1
