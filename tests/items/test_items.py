"""Items as rows: pure functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions import items
from agent_sessions.exceptions import InvalidItem


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 2):
        value = [value]
    return {"deep": value}


def test_what_is_written_can_be_read_from_any_depth_of_the_stack() -> None:
    def read_below(frames: int, data: str) -> Any:
        return read_below(frames - 1, data) if frames else items.decode(data)

    item = nested(items.MAX_DEPTH)
    (row,) = items.encode_batch([item]).rows
    assert read_below(400, row.data) == item


@pytest.mark.parametrize("depth", [items.MAX_DEPTH + 1, 960, 100_000])
def test_what_is_nested_too_deeply_is_refused(depth: int) -> None:
    with pytest.raises(InvalidItem, match="nested"):
        items.encode_batch([nested(depth)])


def test_many_brackets_side_by_side_are_not_deep() -> None:
    item: dict[str, Any] = {"wide": [[{}] for _ in range(1_000)]}
    (row,) = items.encode_batch([item]).rows
    assert items.decode(row.data) == item


def plainly(data: str) -> Any:
    """Read a row as Python's own reader does."""
    try:
        item = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) else None


@pytest.mark.parametrize(
    "value",
    [
        *("0", "-0", "-0.0", "1e22", "1E400", "-1e400", "1e-400", "0E-0", "01", "1."),
        *(".5", "+1", "9223372036854775808", "-9223372036854775809", "9" * 4_300),
        *("9" * 4_301, "123456789012345678901234567890.5", "0." + "3" * 999),
        *("NaN", "Infinity", "-Infinity", "nan", "-NaN", "tru", "null"),
        *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\x00"'),
        *('"\t"', '"\\x"', '"\\/"', '"\u2028"', "[1,]", "{,}", "[" * 300),
        *('{"b": 1, "c": 2, "b": 3}', '{"": 1}', "1} ", " 1 }x", "1 }\x0b", ""),
    ],
)
def test_rows_are_read_as_pythons_own_reader_does(value: str) -> None:
    data = f'{{"a": {value}}}'
    assert repr(items.decode(data)) == repr(plainly(data))


@given(st.text('{}[]",:0123456789eE+-.\\ntrufalsN I\n', max_size=14))
def test_whatever_a_row_holds_is_read_as_pythons_own_reader_does(text: str) -> None:
    for data in (text, f'{{"a":{text}}}', f"\ufeff{text}"):
        assert repr(items.decode(data)) == repr(plainly(data))


@given(st.floats() | st.integers())
def test_numbers_are_read_to_the_last_bit(number: float) -> None:
    data = json.dumps({"a": number})
    assert repr(items.decode(data)) == repr(json.loads(data))


@pytest.mark.parametrize("data", [None, 1, b"\xff", b'{"a": 1}'])
def test_rows_that_are_no_text_are_read_or_none(data: Any) -> None:
    assert items.decode(data) == ({"a": 1} if data == b'{"a": 1}' else None)


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (b'{"a":1}', {"a": 1}),
        (b'{"a":"\xc3\xa9"}', {"a": "é"}),
        (b'{"a":"\\ud800"}', {"a": "\ud800"}),
        (b'{"a":"\xff"}', None),
        (b'{"\xff":1}', None),
        (b'{"a":"\xed\xa0\x80"}', None),
        (b'\xef\xbb\xbf{"a":1}', None),
        ('{"a":1}'.encode("utf-16"), None),
        ('{"a":1}'.encode("utf-16-le"), None),
    ],
)
def test_text_is_read_as_its_bytes_are(data: bytes, item: Any) -> None:
    """A text column gives bytes that are no UTF-8 as raw lone surrogates."""
    text = data.decode(errors="surrogateescape")
    assert items.decode(text) == items.decode(data) == item


@pytest.mark.parametrize("data", ['{"a":"\ud800"}', '{"a":"\ud800\\ud800"}'])
def test_raw_lone_surrogates_are_unreadable(data: str) -> None:
    assert items.decode(data) is None


def test_an_error_names_the_item_and_not_its_contents() -> None:
    batch = [{"role": "user"}, {"secret words": float("nan")}]
    with pytest.raises(InvalidItem, match="Item 1 of 2") as raised:
        items.encode_batch(batch)
    assert "secret" not in str(raised.value)


def test_columns_are_drawn_from_the_item() -> None:
    batch = items.encode_batch(
        [
            {"role": "user", "content": "\n  First line \nsecond"},
            {"type": "function_call", "name": "look\x00up", "call_id": "c" * 300},
            {
                "type": "message",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "one"},
                    {"type": "refusal", "refusal": "two \ud800"},
                    {"type": "input_image", "image_url": "x"},
                    "odd",
                ],
            },
            {"role": "user", "content": None},
        ]
    )
    user, call, answer, odd = batch.rows
    assert (user.type, user.role, user.turn) == ("message", "user", 1)
    assert (call.tool_name, len(call.call_id), call.text) == ("look\ufffdup", 255, "")
    assert answer.text == "one\ntwo ?"
    assert (odd.turn, odd.text, batch.turns) == (2, "", 2)
    assert batch.title == "First line"


def test_titles_are_cut_to_a_line() -> None:
    assert items.first_line("x" * 100) == "x" * 79 + "…"
    assert items.first_line(" \n\n") == "…"
