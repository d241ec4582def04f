"""What may be printed: one table."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from agent_sessions.characters import ascii_json, printable, printable_lines
from agent_sessions.exceptions import AgentSessionError

pytestmark = pytest.mark.one_database

# Everything here can be stored in an id: no NUL, no lone surrogate.
HOSTILE = (
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x9d52;\x7f\x08\r\n\u202e\u2066\u200f\u061c"
    "\u200b\u2028\u2029\U000e0041\ue000\u0378\u3164\U000e0100\u2060\ufeff\u00ad"
)
# The ends that joiners need; alone they are as invisible as the rest.
JOINERS = "\u200c\u200d\ufe0f"
READABLE = [
    "plain",
    "Straße, naïve: 100 % “quoted”",
    "שלום עולם",
    "مرحبا",
    "می\u200cخواهم",  # noqa: RUF001
    "क\u094d\u200dष",
    "日本語\u3000です",
    "👩\u200d💻 ❤\ufe0f\u200d🔥 1\ufe0f\u20e3 👨\u200d👩\u200d👧 👩🏽\u200d⚕\ufe0f 🙂\u200d↔\ufe0f",
]


def leaks(text: str, kept: str = "") -> set[str]:
    """Name the characters of a text that aren't to be printed."""
    return {
        character
        for character in text
        if character not in kept + JOINERS
        and (
            unicodedata.category(character)
            in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
            or character in "\u034f\u115f\u1160\u3164\uffa0\ufe00\ufe0e\U000e0100"
        )
    }


class TestTable:
    @pytest.mark.parametrize("text", READABLE)
    def test_text_that_people_read_is_as_it_was(self, text: str) -> None:
        assert printable(text) == text
        assert printable_lines(text) == text

    def test_no_other_character_passes(self) -> None:
        everything = "".join(map(chr, range(sys.maxunicode + 1)))
        for clean, kept in ((printable, ""), (printable_lines, "\n\t")):
            cleaned = clean(everything)
            assert not leaks(cleaned, kept)
            assert not set(JOINERS) & set(cleaned)
            assert clean(cleaned) == cleaned
        assert len(printable(everything)) == len(everything)

    @pytest.mark.parametrize(
        "text",
        [
            "a\u200db",
            "a\u200cb",
            "a\ufe0fb",
            "👩\u200db",
            "👩\u200d",
            "\u200d👩",
            "1\ufe0f",
            "a\ufe0f\u200d👩",
            "中\u200d文",
            "❤\ufe0f\ufe0f",
            "👩\u200d\u200d💻",
            "👩\u200d\u202e",
        ],
    )
    def test_a_joiner_that_joins_nothing_is_shown(self, text: str) -> None:
        cleaned = printable(text)
        assert "\ufffd" in cleaned
        assert printable(cleaned) == cleaned

    def test_a_line_end_stays_in_contents_only(self) -> None:
        assert printable("a\r\nb\tc\x1b") == "a␍␊b␉c␛"
        assert printable_lines("a\r\nb\tc\x1b\rd") == "a\nb\tc␛\nd"

    def test_json_is_ascii_that_is_printed(self) -> None:
        text = ascii_json(json.dumps(HOSTILE + "\ud800\x00"))
        assert text.isprintable()
        assert text.isascii()
        assert json.loads(text) == HOSTILE + "\ud800\x00"

    def test_errors_are_one_line(self) -> None:
        assert not leaks(str(AgentSessionError(f"No {HOSTILE}.")))
