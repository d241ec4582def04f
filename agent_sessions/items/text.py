"""Texts drawn from items, as a column of any database takes them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from agent_sessions.characters import cut_whole, shown_on_a_line

Item = dict[str, Any]

TITLE_LENGTH = 80
# The title of a message that shows no text: a picture, or characters that aren't seen.
UNSEEN = "…"
# Of a message's text a column keeps as much as a list shows: all of it is in the item,
# and would take twice the place, and a page more at each append.
TEXT_LENGTH = 200


def text_of(item: Item, length: int | None = None) -> str:
    """Join the texts of a message's content, up to a length; leave out other parts."""
    content = item.get("content")
    if isinstance(content, str):
        return clean_text(_cut(content, length))
    if not isinstance(content, list):
        return ""
    texts = [
        part.get("text") or part.get("refusal") or part.get("transcript")
        for part in content
        if isinstance(part, dict)
    ]
    joined = "\n".join([text for text in texts if isinstance(text, str)])
    # Cut first: cleaning keeps the length, and looks at every character.
    return clean_text(_cut(joined, length))


def _cut(text: str, length: int | None) -> str:
    """Cut a text where people see no character cut through."""
    if length is None or len(text) <= length:
        return text
    # Empty lines at the top would leave nothing to see.
    return cut_whole(text.lstrip(), length)


def title_of(texts: Iterable[str]) -> str:
    """Return the title that messages give, by the first one that shows something."""
    title = ""
    for text in texts:
        title = first_line(text)
        if title != UNSEEN:
            break
    return title


def first_line(text: str) -> str:
    """Return the first line that shows something, cut to a title's length.

    It is composed (NFC), as a search writes it, and has nothing that isn't seen.
    """
    lines = map(shown_on_a_line, text.splitlines())
    line = unicodedata.normalize("NFC", next(filter(None, lines), UNSEEN))
    if len(line) <= TITLE_LENGTH:
        return line
    return cut_whole(line, TITLE_LENGTH - 1) + "…"


def clean_text(text: str) -> str:
    """Replace what no database's text column takes: NUL and lone surrogates."""
    if text.isascii():
        return text.replace("\x00", "\ufffd") if "\x00" in text else text
    text = text.encode("utf-8", "replace").decode() if _has_surrogate(text) else text
    return text.replace("\x00", "\ufffd")


def column(value: Any) -> str:
    """Return a string as a column takes it, and nothing for other values."""
    if not isinstance(value, str):
        return ""
    # Nearly all are plain, and there are four of an item.
    plain = value.isascii() and "\x00" not in value
    return value if plain else clean_text(value)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
