"""Transcripts as Markdown, read back by a Markdown parser."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from agent_sessions.items import StoredItem
from agent_sessions.transcript.markdown import PART_LENGTH, markdown
from tests.transcript.test_transcript import JSON, KINDS, PIXEL, stored

HOSTILE = [
    "# Heading",
    "```\n# Heading\n```",
    "````\n~~~\n<script>alert(1)</script>",
    "![x](https://example.org/x.png)",
    "<img src=https://example.org/x.png onerror=alert(1)>",
    "`` ` ``` [a](javascript:alert(1))",
    "a\n\n- list\n\n> quote\r\n\r\n***\r## Heading",
    "`",
    " ",
    "\x1b[31mred\x1b[0m\x07\x9b1m",
    "[ref]: https://example.org\n\n[ref]",
]


def write(*items: Any, **options: Any) -> str:
    return "\n".join(markdown(stored(*items), **options)) + "\n"


def tokens(text: str) -> list[Token]:
    found = MarkdownIt("commonmark").parse(text)
    return [*found, *(child for token in found for child in token.children or ())]


def kinds(text: str) -> set[str]:
    return {token.type for token in tokens(text)}


def fences(text: str) -> list[str]:
    return [token.content for token in tokens(text) if token.type == "fence"]


def headings(text: str) -> list[str]:
    found = MarkdownIt("commonmark").parse(text)
    return [
        found[n + 1].content for n, t in enumerate(found) if t.type == "heading_open"
    ]


def test_a_conversation() -> None:
    text = write(
        {"role": "user", "content": "What's the weather?\n\nIn Rome."},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "weather",
            "arguments": '{"city":"Rome"}',
        },
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        title="chat",
        facts=[("Store", "default"), ("Owner", "")],
    )
    assert headings(text) == [
        "`chat`",
        "1. User",
        "2. Tool `weather` (`c1`)",
        "3. Tool output `weather` (`c1`)",
        "4. Assistant",
    ]
    assert fences(text) == [
        "What's the weather?\n\nIn Rome.\n",
        '{\n  "city": "Rome"\n}\n',
        "Sunny\n",
        "No.\n",
    ]
    assert "- Store: `default`" in text
    assert "Owner" not in text
    assert "2026-01-02 03:04:00 UTC" in text
    assert "Refused:" in text


def test_handoffs_and_silence_are_told() -> None:
    text = "\n".join(
        markdown(
            stored(
                {
                    "type": "function_call",
                    "call_id": "a",
                    "name": "transfer_to_billing",
                },
                {
                    "type": "function_call_output",
                    "call_id": "a",
                    "output": '{"assistant": "Billing"}',
                },
                step=timedelta(minutes=7),
            )
        )
    )
    assert "*Handoff to `Billing`*" in text
    assert "*7 minutes later*" in text


def test_images_and_files_are_named_and_never_loaded() -> None:
    text = write(
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": PIXEL},
                {"type": "input_image", "image_url": "https://example.org/x.png"},
                {"type": "input_file", "filename": "a.txt", "file_data": "QUFB"},
            ],
        }
    )
    assert "image" not in kinds(text)
    assert "link_open" not in kinds(text)
    assert "Image: `https://example.org/x.png`" in text
    assert "File: `a.txt` (3 bytes)" in text


def test_what_only_the_provider_reads_is_told_by_its_size() -> None:
    text = write(
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
        {"__enc__": 1, "kid": "k1", "payload": "abcd"},
        {"type": "compaction", "id": "cmp_1", "encrypted_content": "x"},
        {"type": "telepathy"},
    )
    assert "Encrypted, 3 characters" in text
    assert "xyz" not in text
    assert "Encrypted `k1`" in text
    assert "*History compacted here* `cmp_1`" in text
    assert "Type `telepathy`" in text


def test_texts_are_whole_where_a_page_would_cut_them() -> None:
    text = write({"role": "user", "content": "x" * 50_000})
    assert fences(text) == ["x" * 50_000 + "\n"]
    text = write({"role": "user", "content": "x" * (PART_LENGTH + 1)})
    assert f"*Cut; the whole has {PART_LENGTH + 1} characters.*" in text


def test_unreadable_rows_stand_in_their_places() -> None:
    row = StoredItem(7, 0, None, '{"a": `', datetime(2026, 1, 2, tzinfo=UTC))
    text = "\n".join(markdown([row]))
    assert headings(text) == ["7. Unreadable item: `Expecting value at character 6`"]
    assert fences(text) == ['{"a": `\n']


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_contents_are_inert_and_exact(text: str) -> None:
    written = write(
        {"role": "user", "content": text},
        {"role": text, "content": text},
        {"type": "function_call", "call_id": text, "name": text, "arguments": text},
        {"type": text, "x": text},
        title=text,
        facts=[("Owner", text)],
    )
    check_inert(written, items=4)
    shown = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\x1b" not in shown:
        assert fences(written)[0] == shown + "\n"
    assert not any(ord(c) < 32 and c not in "\t\n" for c in written)
    assert "\x9b" not in written


@given(items=st.lists(JSON, max_size=3))
def test_any_item_is_inert(items: list[Any]) -> None:
    rows = [
        StoredItem(
            n,
            0,
            item if isinstance(item, dict) else None,
            json.dumps(item),
            datetime(2026, 1, 2, tzinfo=UTC),
        )
        for n, item in enumerate(items)
    ]
    check_inert("\n".join(markdown(rows)), items=len(rows))


def test_every_kind_is_written() -> None:
    items = [{"type": name, **item} for name, (item, _) in KINDS.items()]
    check_inert(write(*items), items=len(items))


def check_inert(text: str, *, items: int) -> None:
    assert not {"image", "link_open", "html_block", "html_inline"} & kinds(text)
    assert not {"blockquote_open", "code_block", "hr"} & kinds(text)
    found = [h for h in headings(text) if not h.startswith("`")]
    assert len(found) == items
    text.encode()
