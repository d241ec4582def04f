"""Texts that are nearly a key: one that was cut, quoted or copied with more around it.

Such a text is no pass phrase. Taken as one it would be another key: what the right key
has written would not open, and what is written would open with the cut text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

_KEY = re.compile(r"[A-Za-z0-9_+/-]{43}=")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
# What often gets into a key, and what is left without it.
_QUOTES = (
    "\"'`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a"
)
_REPR = re.compile(r"[bBrRuU]{1,2}(['\"])(.*)\1", re.DOTALL)
_NAMED = re.compile(r"(?:export\s+)?[A-Za-z_][\w.-]*\s*[=:]\s*(?=\S)")
_CODES = {"%3D": "=", "%2B": "+", "%2F": "/", "=3D": "=", "&#61;": "=", "\uff1d": "="}
_BLANKS = re.compile(r"(?:\s|\\[nrt]|[\u200b-\u200f\u2060\ufeff\u00ad]|\x00)+")
_ENDS = ",;:.[](){}<>"
# How many characters may be missing, or be too many.
_MOST = 8
# How often neighbours are of another kind in random text; in words they seldom are.
_RANDOM = 0.4


def is_key(text: str) -> bool:
    """Return whether a text is 32 bytes as base64, in either alphabet."""
    return bool(_KEY.fullmatch(text))


def is_hex(text: str) -> bool:
    """Return whether a text is 32 bytes in hexadecimal digits."""
    return bool(_HEX.fullmatch(text))


def find_fault(text: str) -> str | None:
    """Return what is wrong with a text that is nearly a key; None for any other text.

    What is said doesn't quote the text.
    """
    if is_key(text) or is_hex(text):
        return None
    bare, around = _bare(text)
    if around and (is_key(bare) or is_hex(bare)):
        return f"It is a key with {' and '.join(around)}. Remove what isn't the key."
    fault = _length_fault(bare)
    if fault is not None and around:
        return f"{fault} It also has {' and '.join(around)}."
    return fault


def _bare(text: str) -> tuple[str, list[str]]:
    """Take off what isn't part of a key; say what that was."""
    found: list[str] = []
    before = None
    while before != text:
        before = text
        for name, change in _CHANGES.items():
            changed = change(text)
            if changed != text:
                text = changed
                if name not in found:
                    found.append(name)
    return text, found


def _unquoted(text: str) -> str:
    return text.strip(_QUOTES)


def _unpacked(text: str) -> str:
    match = _REPR.fullmatch(text)
    return match[2] if match else text


def _unnamed(text: str) -> str:
    # The equals sign at the end of a key is none of a name's.
    match = None if is_key(text[:44]) else _NAMED.match(text)
    rest = text[match.end() :] if match else ""
    return rest if len(rest.strip(_QUOTES + "=")) >= 22 else text


def _decoded(text: str) -> str:
    for code, character in _CODES.items():
        text = text.replace(code, character)
    return text


_CHANGES: dict[str, Callable[[str], str]] = {
    "the b'…' that Python prints around bytes": _unpacked,
    "quotes around it": _unquoted,
    "a name in front of it": _unnamed,
    "blanks or a line's end in it": lambda text: _BLANKS.sub("", text),
    "an equals sign that is written as a code": _decoded,
    "a comma or a bracket around it": lambda text: text.strip(_ENDS),
    "0x in front of it": lambda text: re.sub(r"^0[xX](?=[0-9A-Fa-f]{60,})", "", text),
}


def _length_fault(text: str) -> str | None:
    letters = text.rstrip("=")
    padding = len(text) - len(letters)
    if len(letters) == 43 and padding != 1 and is_key(f"{letters}="):
        if padding:
            return f"It ends with {padding} equals signs; a key ends with one."
        return "It is a key that has lost its last character, the equals sign ('=')."
    if re.fullmatch(r"[A-Za-z0-9_+/-]+=[A-Za-z0-9_+/=,;:|-]+", text) and (
        is_key(text[:44]) or is_key(text[-44:])
    ):
        return "It is a key and something more. Give each key as a text of its own."
    if re.fullmatch(r"[0-9A-Fa-f]+", text):
        if 64 - _MOST <= len(text) <= 64 + _MOST:
            return (
                f"It looks like 32 bytes in hexadecimal digits, but has {len(text)} "
                "of 64: some are missing or too many."
            )
        return None
    kept = re.sub(r"[^A-Za-z0-9_+/-]", "", letters)
    foreign = len(letters) - len(kept)
    if padding and not foreign:
        return _wrong_size(kept, padding)
    if foreign and foreign <= 2 and 43 - 2 <= len(letters) <= 43 + 2:
        if padding == 1 or (not padding and _is_random(kept)):
            return "It looks like a key with a character in it that no key has."
        return None
    if not foreign and _is_random(kept):
        return _wrong_size(kept, padding)
    return None


def _wrong_size(letters: str, padding: int) -> str | None:
    count = len(letters)
    if not padding and count not in {22, 32} and abs(count - 43) > _MOST:
        return None
    size = count * 3 // 4
    if size in {16, 24} and (count + padding) % 4 in {0, 2}:
        return f"It looks like base64 of {size} bytes; a key has 32."
    fault = "there is more than that" if count > 43 else "a part is missing"
    return (
        f"It looks like base64, but not of 32 bytes: {fault}. It has "
        f"{count} characters before the equals sign; a key has 43."
    )


def _is_random(text: str) -> bool:
    """Return whether a text looks random: letters of both cases and digits, mixed."""
    kinds = [_kind(character) for character in text]
    if not {"a", "A", "0"} <= set(kinds):
        return False
    changes = sum(one != other for one, other in pairwise(kinds))
    return changes >= _RANDOM * (len(kinds) - 1)


def _kind(character: str) -> str:
    if character.islower():
        return "a"
    if character.isupper():
        return "A"
    return "0" if character.isdigit() else "-"
