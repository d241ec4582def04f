"""Old tool outputs are shortened in what the model sees; tokens are counted."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import tiktoken
from tiktoken import registry

from agent_sessions.windows import (
    MARKER,
    Window,
    chain,
    count_tokens,
    drop_old_tool_outputs,
    estimate_tokens,
    tiktoken_counter,
    token_budget,
)
from tests.support.histories import Item, calls, gives, says, user

LONG = "The weather in Paris is fine today. " * 20
NEW = [user("new")]


def shortened(item: Item, **options: Any) -> Item:
    """Return what an old item becomes, beside a newer turn."""
    history = [calls("c"), copy.deepcopy(item), user("q"), says("a")]
    window = drop_old_tool_outputs(**options)
    kept = window(history, NEW)
    assert kept == [*history, *NEW]
    assert window(copy.deepcopy(history), NEW) == kept, "not idempotent"
    return history[1]


# --- tool outputs --------------------------------------------------------------


def test_old_outputs_become_a_marker_and_newer_ones_stay() -> None:
    history = [
        item
        for n in range(3)
        for item in (user(f"q{n}"), calls(f"c{n}"), gives(f"c{n}", LONG))
    ]
    for keep, expected in (
        (0, [MARKER, MARKER, MARKER]),
        (1, [MARKER, MARKER, LONG]),
        (2, [MARKER, LONG, LONG]),
        (9, [LONG, LONG, LONG]),
    ):
        given = copy.deepcopy(history)
        new = [gives("c9", LONG)]
        kept = drop_old_tool_outputs(keep)(given, new)
        assert kept.pop() is new[0]
        assert new == [gives("c9", LONG)]
        outputs = [i["output"] for i in kept if i.get("type") == "function_call_output"]
        assert outputs == expected
        # The very objects: a copy would be stored anew in every run.
        assert [id(item) for item in kept] == [id(item) for item in given]


@pytest.mark.parametrize(
    ("item", "field", "expected"),
    [
        ({"type": "custom_tool_call_output", "call_id": "c"}, "output", MARKER),
        ({"type": "local_shell_call_output", "call_id": "c"}, "output", MARKER),
        ({"type": "apply_patch_call_output", "call_id": "c"}, "output", MARKER),
        ({"type": "program_output", "call_id": "c"}, "result", MARKER),
        ({"type": "mcp_call", "id": "m", "arguments": "{}"}, "output", MARKER),
    ],
)
def test_texts_of_every_kind_of_tool(item: Item, field: str, expected: str) -> None:
    call = {"type": item["type"].removesuffix("_output"), "call_id": "c"}
    history = [call, item | {field: LONG}, user("q")]
    assert drop_old_tool_outputs()(history, NEW)[1] == item | {field: expected}


def test_results_of_hosted_tools_keep_their_shape() -> None:
    shell = {"type": "shell_call", "call_id": "c"}
    outcome = {"type": "exit", "exit_code": 1}
    streams = {"stdout": LONG, "stderr": "no", "outcome": outcome}
    output = {"type": "shell_call_output", "call_id": "c", "output": [streams]}
    logs = {"type": "logs", "logs": LONG}
    image = {"type": "image", "url": "https://example.com/a.png"}
    code = {"type": "code_interpreter_call", "id": "ci", "outputs": [logs, image]}
    found = {"file_id": "f", "score": 0.5, "text": LONG}
    search = {"type": "file_search_call", "id": "fs", "results": [found, 3]}
    empty = {"type": "file_search_call", "id": "fs2", "results": None}
    history: list[Item] = [shell, output, code, search, empty, user("q")]
    kept = drop_old_tool_outputs()(history, NEW)
    assert kept[1]["output"] == [streams | {"stdout": MARKER}]
    assert kept[2]["outputs"] == [logs | {"logs": MARKER}, image]
    assert kept[3]["results"] == [found | {"text": MARKER}, 3]
    assert kept[4] == empty


def test_screenshots_found_tools_and_messages_stay() -> None:
    screen = {"type": "computer_screenshot", "image_url": "data:image/png;base64,AA"}
    items: list[Item] = [
        user(LONG),
        {"type": "computer_call", "call_id": "c"},
        {"type": "computer_call_output", "call_id": "c", "output": screen},
        {"type": "tool_search_call", "call_id": "t"},
        {"type": "tool_search_output", "call_id": "t", "tools": [{"name": LONG}]},
        says(LONG),
        user("q"),
    ]
    before = copy.deepcopy(items)
    assert drop_old_tool_outputs(0)(items, NEW) == [*before, *NEW]


@pytest.mark.parametrize(
    ("output", "options", "expected"),
    [
        ("short", {}, "short"),
        (LONG, {"marker": ""}, ""),
        (LONG, {"keep_characters": 11}, f"The weather\n{MARKER}"),
        ("x" * 40, {"keep_characters": 11}, "x" * 40),
        ([{"type": "input_text", "text": LONG}], {}, MARKER),
        (
            [{"type": "input_text", "text": "a"}],
            {},
            [{"type": "input_text", "text": "a"}],
        ),
        ([{"type": "input_image", "image_url": "data:,"}], {}, MARKER),
        (
            [{"type": "input_text", "text": LONG}, {"type": "input_image"}],
            {"keep_characters": 3},
            f"The\n{MARKER}",
        ),
        ([{"type": "input_image"}], {"keep_characters": 3}, f"\n{MARKER}"),
        ([], {}, []),
        (None, {}, None),
    ],
)
def test_outputs_are_only_ever_replaced_by_shorter_ones(
    output: Any, options: dict[str, Any], expected: Any
) -> None:
    assert shortened(gives("c", output), **options)["output"] == expected


def test_tools_whose_output_must_stay() -> None:
    """Instructions that a tool loaded are no use as a marker."""
    history = [
        calls("a", "load_skill"),
        gives("a", LONG),
        calls("b", "search", namespace="crm"),
        gives("b", LONG),
        calls("c"),
        gives("c", LONG),
        {"type": "mcp_call", "server_label": "git", "name": "log", "output": LONG},
        user("q"),
    ]
    window = drop_old_tool_outputs(keep_tools=["load_skill", "crm.search", "git.log"])
    outputs = [i["output"] for i in window(history, NEW) if "output" in i]
    assert outputs == [LONG, LONG, MARKER, LONG]
    with pytest.raises(TypeError, match="give a list of tools' names"):
        drop_old_tool_outputs(keep_tools="load_skill")


@pytest.mark.parametrize("name", [{}, ["search"], None, 7])
def test_a_tools_name_may_be_anything(name: Any) -> None:
    history = [calls("a", name), gives("a", LONG), user("q")]
    window = drop_old_tool_outputs(keep_tools=["search"])
    assert window(history, NEW)[1]["output"] == MARKER


def test_a_budget_after_it_counts_what_is_left() -> None:
    history = [user("q"), calls("c"), gives("c", LONG), says("a"), user("q2")]
    small = token_budget(100, at_least=0)
    assert small(copy.deepcopy(history), NEW) == [user("q2"), *NEW]
    both: Window = chain(drop_old_tool_outputs(), small)
    assert len(both(history, NEW)) == 6


# --- tokens --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (user(""), 4),
        (user("abcd" * 10), 14),
        (user("abcde"), 6),
        (user("1234,;.!"), 8),
        (user("日本語日"), 7),
        (user("\ud800"), 5),
        (says("abcd"), 5),
        ({"type": "function_call", "id": "x" * 99, "arguments": "abcd"}, 5),
        ({"type": "reasoning", "encrypted_content": "x" * 999}, 4),
        ({"type": "image_generation_call", "result": "x" * 9999}, 1004),
        (user([{"type": "input_image", "image_url": "x" * 9999}]), 1004),  # type: ignore[arg-type]
        ({"type": "computer_call", "action": {"x": 10, "y": None, "on": True}}, 6),
    ],
)
def test_the_estimate(item: Item, expected: int) -> None:
    assert estimate_tokens(item) == expected


@pytest.mark.parametrize("kind", [["image"], {"type": "image"}, 7, None])
def test_a_type_may_be_anything(kind: Any) -> None:
    assert estimate_tokens({"type": kind, "text": "abcd"}) == 5


@pytest.mark.parametrize("field", ["input_schema", "parameters", "output_schema"])
@pytest.mark.parametrize(
    ("name", "like"), [("type", "city"), ("id", "at"), ("status", "number")]
)
def test_a_schema_is_text_whatever_its_properties_are_called(
    field: str, name: str, like: str
) -> None:
    """What has no text in an item may well be a tool's argument."""

    def listed(name: str) -> Item:
        about = {"type": ["string", "null"], "description": LONG}
        schema = {"type": "object", "properties": {name: about}}
        tools = [{"name": "look", field: schema}]
        return {"type": "mcp_list_tools", "tools": tools}

    tokens = estimate_tokens(listed(name))
    assert tokens == estimate_tokens(listed(like)) > estimate_tokens(user(LONG))
    assert tokens < estimate_tokens(user(LONG)) + 50
    history = [user("q"), listed(name), user("q2")]
    assert token_budget(50)(history, NEW) == [user("q2"), *NEW]


def test_an_image_in_a_schema_is_none() -> None:
    schema = {"properties": {"type": "image"}}
    assert estimate_tokens({"tools": [{"parameters": schema}]}) < 100
    assert estimate_tokens({"tools": [{"parameters": None}]}) == 4


@pytest.fixture
def encoding() -> tiktoken.Encoding:
    """A real encoding of its library; the public ones would have to be downloaded."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([n]): n for n in range(256)} | {b"ab": 256},
        special_tokens={"<|end|>": 257},
    )


def test_counting_with_tiktoken(encoding: tiktoken.Encoding) -> None:
    counter = tiktoken_counter(encoding)
    assert counter(user("abab")) == 4 + 2
    # A special token in a user's text is text, and no error.
    assert counter(user("<|end|>")) == 4 + 7
    assert counter(user("x" * 10_000)) == 4 + 10_000
    window = token_budget(10, counter=counter, at_least=0)
    assert window([user("abab"), user("ab")], []) == [user("ab")]
    assert "bytes" in repr(window)


def test_tiktoken_is_used_by_itself_once_its_encoding_is_loaded(
    encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_tokens(user("abababab")) == estimate_tokens(user("abababab")) == 6
    monkeypatch.setitem(registry.ENCODINGS, "o200k_base", encoding)
    assert count_tokens(user("abababab")) == 8
    assert tiktoken_counter()(user("abababab")) == 8


def test_without_tiktoken_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.delitem(sys.modules, "tiktoken.registry")
    assert count_tokens(user("abcd")) == 5
    with pytest.raises(ImportError, match=r"django-agent-sessions\[tiktoken\]"):
        tiktoken_counter()
