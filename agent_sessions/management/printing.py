"""What commands print: tables, JSON, and nothing that a terminal would obey."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

# Control characters as their pictures; others that move the cursor or turn text round.
_SAFE = {code: 0x2400 + code for code in range(0x20)} | {
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F)], 0xFFFD),
    **dict.fromkeys(range(0x2066, 0x206A), 0xFFFD),
}
# Rows by which the widths of columns are chosen.
_PAGE = 100


def printable(text: Any) -> str:
    """Give a text on one line that a terminal only shows."""
    return str(text).translate(_SAFE).encode("utf-8", "replace").decode()


def moment(when: datetime | None) -> str:
    """Give a time to the second."""
    return "" if when is None else when.isoformat(" ", "seconds")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Give the lines of a table; memory doesn't grow with the rows."""
    page: list[list[str]] = [list(heads)]
    widths: list[int] = []
    for row in rows:
        page.append([printable(cell) for cell in row])
        if len(page) > _PAGE:
            widths = widths or _widths(page)
            yield from _lines(page, widths)
            page = []
    yield from _lines(page, widths or _widths(page))


def json_list(values: Iterable[Any]) -> Iterator[str]:
    """Give the lines of a JSON list, one value a line."""
    before = "["
    for value in values:
        yield before + json.dumps(value)
        before = ","
    yield "[]" if before == "[" else "]"


def _widths(page: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*page, strict=True)]


def _lines(page: list[list[str]], widths: list[int]) -> Iterator[str]:
    for row in page:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
