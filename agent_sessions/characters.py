"""The characters that are printed on terminals, in Markdown, in JSON and in titles.

Letters, marks, digits, symbols and spaces are printed. Control characters, characters
that reverse text and invisible ones are replaced: C0 and DEL by their pictures, all
others by U+FFFD. They are the categories Cc, Cf, Cs, Co, Cn, Zl and Zp, and a few
invisible marks and letters. Joiners are printed where a script or an emoji needs them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Set
from typing import Any

_REPLACEMENT = 0xFFFD
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Marks and letters that are invisible, and places for more of them: they hide data, or
# make ids differ that look the same.
_INVISIBLE = frozenset(
    {
        0x034F,
        0x115F,
        0x1160,
        0x17B4,
        0x17B5,
        *range(0x180B, 0x1810),
        0x2065,
        0x3164,
        *range(0xFE00, 0xFE10),
        0xFFA0,
        *range(0xFFF0, 0xFFF9),
        *range(0xE0000, 0xE1000),
    }
)
_NON_JOINER, _JOINER, _EMOJI_STYLE = 0x200C, 0x200D, 0xFE0F
# Characters that a joiner combines into one emoji, and the scripts in which it chooses
# the form of a letter: from Arabic to Tibetan, Khmer and Mongolian.
_PICTURE = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
_LETTER = "\u0600-\u109f\u1780-\u17b3\u17b6-\u180a\u1820-\u18af"
_JOINERS = re.compile(
    f"(?<=[{_PICTURE}])\u200d(?=[{_PICTURE}])"
    f"|(?<=[{_PICTURE}]\ufe0f)\u200d(?=[{_PICTURE}])"
    f"|(?<=[{_LETTER}])[\u200c\u200d](?=[{_LETTER}])"
    f"|(?<=[{_PICTURE}])\ufe0f"
    "|(?<=[0-9#*])\ufe0f(?=\u20e3)"
    "|(?P<misplaced>[\u200c\u200d\ufe0f])"
)


# The flag of a region is a black flag and invisible letters, which nothing else uses.
_FLAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)")
_SKINS = range(0x1F3FB, 0x1F400)
_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_THAI_AM = "\u0e33\u0eb3"
_JAMO = "\u1100-\u11ff\ua960-\ua97c\ud7b0-\ud7fb"
_SYLLABLE = re.compile(
    f"[{_JAMO}\uac00-\ud7a3][\u1160-\u11ff\ud7b0-\ud7fb]|[{_JAMO}][\uac00-\ud7a3]"
)


class _Table(dict[int, int | None]):
    """What each character becomes; the table holds nothing, so memory stays flat."""

    def __init__(self, kept: str, unseen: Set[str], replacement: int | None) -> None:
        super().__init__()
        self._kept = {*map(ord, kept), _NON_JOINER, _JOINER, _EMOJI_STYLE}
        self._unseen = unseen
        self._replacement = replacement

    def __missing__(self, code: int) -> int | None:
        if code in self._kept:
            return code
        hidden = code in _INVISIBLE or unicodedata.category(chr(code)) in self._unseen
        if not hidden or self._replacement is None:
            return None if hidden else code
        # C0 and DEL have pictures.
        pictured = code < 0x20 or code == 0x7F
        return 0x2400 + min(code, 0x21) if pictured else self._replacement


_LINE = _Table("", _UNSEEN, _REPLACEMENT)
_LINES = _Table("\n\t", _UNSEEN, _REPLACEMENT)
# A title leaves out what isn't seen.
_TITLE = _Table("", _UNSEEN - {"Co", "Cn"}, None)
# The blanks among Braille and notes are spaces, though symbols by their category.
_TITLE.update(dict.fromkeys((0x09, 0x2800, 0x1D159), 0x20))
_NEWLINES = re.compile(r"\r\n?")


def printable(text: Any) -> str:
    """Return a text as one line of printable characters."""
    return _clean(str(text), _LINE)


def printable_lines(text: Any) -> str:
    """Return a text of printable characters, line ends and tabs."""
    return _clean(_NEWLINES.sub("\n", str(text)), _LINES)


def shown_on_a_line(text: str) -> str:
    """Return a line without characters that reverse it or are invisible."""
    if text.isascii() and text.isprintable():
        return text.strip()
    return "".join(
        part if _FLAGS.fullmatch(part) else _seen(part) for part in _FLAGS.split(text)
    ).strip()


def cut_whole(text: str, length: int) -> str:
    """Cut a text to a length, never within a character as people see it."""
    end = length
    while 0 < end < len(text) and _belongs_before(text, end):
        end -= 1
    return text[: end or length]


def _belongs_before(text: str, place: int) -> bool:
    """Return whether a character is drawn as one with the one before it."""
    before, char = text[place - 1], text[place]
    code = ord(char)
    if code in _INDICATORS:
        # A flag is two of them.
        start = place
        while start and ord(text[start - 1]) in _INDICATORS:
            start -= 1
        return (place - start) % 2 == 1
    return (
        unicodedata.category(char) in {"Mn", "Mc", "Me"}
        or code in {_JOINER, _NON_JOINER}
        or code in _SKINS
        or code in _TAGS
        or char in _THAI_AM
        or ord(before) == _JOINER
        # A virama binds the consonant after it.
        or (unicodedata.combining(before) == 9 and char.isalpha())
        or _SYLLABLE.fullmatch(before + char) is not None
    )


def _seen(text: str) -> str:
    return _JOINERS.sub(
        lambda found: "" if found["misplaced"] else found[0], text.translate(_TITLE)
    )


def ascii_json(text: str) -> str:
    r"""Return JSON that `ensure_ascii` has written, with DEL as \u007f too."""
    return text.replace("\x7f", "\\u007f")


def _clean(text: str, table: _Table) -> str:
    if text.isascii() and text.isprintable():
        return text
    return _JOINERS.sub(_joiner, text.translate(table))


def _joiner(found: re.Match[str]) -> str:
    return chr(_REPLACEMENT) if found["misplaced"] else found[0]
