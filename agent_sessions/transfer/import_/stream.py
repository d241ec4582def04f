"""Read JSON piece by piece, so that a long line needs little memory."""

from __future__ import annotations

import json
import re
from typing import IO, Any

from agent_sessions.transfer.import_.databases import ITEM_BYTES

_FIRST = 256 * 1024
_MORE = re.compile(r"[^ \t\r]")
_decoder = json.JSONDecoder()


class Broken(Exception):
    """The line is no JSON, or it ends too early."""


class TooMuch(Broken):
    """A value, or what is read before the items, has more characters than it may."""


class Stream:
    """A file of one JSON object a line."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self.line = 1
        # Characters of the values that were taken.
        self.taken = 0

    def more_lines(self) -> bool:
        """Pass over empty lines; tell whether another one follows."""
        while (character := self.peek()) == "\n":
            self._at += 1
            self.line += 1
        return bool(character)

    def next_line(self) -> None:
        """Pass over what is left of the line."""
        while (end := self._text.find("\n", self._at)) < 0:
            self._at = len(self._text)
            if not self._fill(_FIRST):
                return
        self._at = end + 1
        self.line += 1

    def place(self) -> tuple[int, str]:
        """Return where it is, for a later `go_back` within the same line."""
        return self._file.tell(), self._text[self._at :]

    def go_back(self, place: tuple[int, str]) -> None:
        """Go back to a place of the same line."""
        position, self._text = place
        self._file.seek(position)
        self._at = 0

    def peek(self) -> str:
        """Look at the next character that isn't blank; "" at the file's end."""
        while True:
            if found := _MORE.search(self._text, self._at):
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if not self._fill(_FIRST):
                return ""

    def take(self, wanted: str) -> str:
        """Take the next character, one of those wanted. Raises Broken."""
        found = self.peek()
        if not found or found not in wanted:
            raise Broken
        self._at += 1
        return found

    def value(self, most: int = ITEM_BYTES) -> Any:
        """Take a whole value of up to so many characters. Raises Broken."""
        self.peek()
        size = _FIRST
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise Broken from None
            except ValueError:
                end = len(self._text)
                # A value that a line's end cuts will never be whole.
                if self._text.find("\n", self._at) >= 0:
                    raise Broken from None
            # A number may go on in what hasn't been read.
            if end < len(self._text):
                if end - self._at > most:
                    raise TooMuch
                self.taken += end - self._at
                self._at = end
                return value
            if len(self._text) - self._at > most:
                raise TooMuch
            size = min(size * 2, most + 1)
            if not self._fill(size):
                raise Broken

    def _fill(self, size: int) -> bool:
        more = self._file.read(size)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)
