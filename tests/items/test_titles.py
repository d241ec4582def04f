"""Titles: what people see is not cut through, and what nobody sees is not in them."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from agent_sessions import get_session, sessions
from agent_sessions.agui.content import cut
from agent_sessions.backends.base import make_key
from agent_sessions.items import encode_batch, first_line, look_through, text_of
from agent_sessions.models import AgentSession
from agent_sessions.transcript import parse

pytestmark = pytest.mark.one_database

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
WHOLE = {
    "family": FAMILY,
    "scotland": SCOTLAND,
    "flag": "\U0001f1e9\U0001f1ea",
    "skin": "\U0001f44d\U0001f3fd",
    "heart": "\u2764\ufe0f",
    "keycap": "1\ufe0f\u20e3",
    "marks": "q\u0323\u0307",
    "devanagari": "\u0915\u094d\u0937\u093f",
    "hangul": "\u1112\u1161\u11ab\u11ab",
    "thai": "\u0e01\u0e33",
}


@pytest.mark.parametrize("name", WHOLE)
def test_no_character_is_cut_through(name: str) -> None:
    whole = WHOLE[name]
    made = unicodedata.normalize("NFC", whole)
    for before in range(60, 84):
        title = first_line("x" * before + whole * 12)
        assert len(title) <= 80
        rest = title.removesuffix("…").lstrip("x")
        assert rest == made * (len(rest) // len(made))


def test_marks_without_end_are_cut_all_the_same() -> None:
    assert len(first_line("q" + "\u0323" * 200)) == 80


@pytest.mark.parametrize(
    "char",
    [
        *"\u202e\u2066\u200f\u061c\u200b\ufeff\u00ad\x1b\x7f",
        # No characters yet, and never to be seen.
        *"\u2065\ufff0\U000e0000\U000e0080\U000e0fff",
    ],
)
def test_what_turns_text_round_or_is_not_seen_is_left_out(char: str) -> None:
    assert first_line(f"pay{char}pal") == "paypal"
    assert first_line(f"{char}\nsecond") == "second"


def test_joiners_stay_where_a_script_or_an_emoji_needs_them() -> None:
    assert first_line("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")[2] == "\u200c"
    assert first_line(FAMILY) == FAMILY
    assert first_line(f"{SCOTLAND}!") == f"{SCOTLAND}!"
    assert first_line("a\u200d\U000e0041b") == "ab"


def test_a_title_is_composed() -> None:
    assert first_line("Cafe\u0301") == "Caf\u00e9"


def test_a_spoken_message_gives_a_title() -> None:
    said = {"type": "input_audio", "audio": None, "transcript": "Hello"}
    assert text_of({"role": "user", "content": [said]}) == "Hello"


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b", "\u202e\ufeff\n\u00ad", "\u2800\n\U0001d159"]
)
def test_a_title_is_never_empty(text: str) -> None:
    said = {"role": "user", "content": text}
    assert encode_batch([said]).title == look_through([said]).title == "…"
    seen = {"role": "user", "content": "Hello"}
    assert encode_batch([said, seen]).title == "Hello"
    assert look_through([said, seen]).title == "Hello"


def test_a_title_is_found_below_many_empty_lines() -> None:
    said = {"role": "user", "content": "\n \t" * 100 + "Hello"}
    assert encode_batch([said]).title == look_through([said]).title == "Hello"


def test_what_holds_no_message_of_a_user_gives_no_title() -> None:
    assert encode_batch([{"role": "assistant", "content": "Hi"}]).title == ""


@pytest.mark.django_db
def test_a_session_that_begins_with_a_picture_has_a_title() -> None:
    picture: Any = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
    said: Any = {"role": "user", "content": [picture]}
    get_session("s").sync.add_items([said])
    assert AgentSession.objects.get().title == "…"


@pytest.mark.django_db
@pytest.mark.parametrize("first", ["", "\u200b", None])
def test_the_first_message_with_words_names_a_session(first: str | None) -> None:
    picture: Any = [{"type": "input_image", "image_url": "data:image/png;base64,aGk="}]
    session = get_session("s").sync
    titles = []
    for content in (picture if first is None else first, "Hello", "Later", " "):
        session.add_items([{"role": "user", "content": content}])
        session.add_items([{"role": "assistant", "content": "Yes"}])
        titles.append(AgentSession.objects.get().title)
    assert titles == ["…", "Hello", "Hello", "Hello"]


@pytest.mark.django_db
def test_a_directory_takes_the_first_title_with_words() -> None:
    """A store that isn't the database names its sessions in the same way."""
    directory, key = sessions["default"].directory, make_key("s", None)
    directory.create(key)
    titles = []
    for title in ("", "…", "", "Hello", "…", "Later"):
        directory.touch(key, added=1, title=title)
        titles.append(AgentSession.objects.get().title)
    assert titles == ["", "…", "…", "Hello", "Hello", "Hello"]


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_that_is_shown_is_cut_through_a_character(name: str) -> None:
    whole = WHOLE[name]

    def is_whole(text: str) -> bool:
        return text == whole * (len(text) // len(whole))

    def ends_whole(text: str) -> bool:
        return text.endswith((whole, "x"))

    for before in range(len(whole) + 1):
        said = {"role": "user", "content": "x" * before + whole * 2_000}
        column = encode_batch([said]).rows[0].text
        assert 150 < len(column) <= 200
        assert is_whole(column.lstrip("x"))
        entry = parse({**said, "content": "\n" * 300 + said["content"] * 5})
        preview = entry.preview.removesuffix("…")
        assert preview.startswith("x" * before + whole)
        assert is_whole(preview[before:])
        # A page carries so much of a part.
        assert 9_990 < len(entry.parts[0].text) <= 10_000
        assert ends_whole(entry.parts[0].text)
        shown, was_cut = cut(said["content"], 1_000)
        assert was_cut
        assert is_whole(shown.split("\n")[0].lstrip("x"))
