"""One branch's rows, read once from the first to the last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent_sessions.backends.database.lineage import Segment, visible
from agent_sessions.doctor.turns import read_pages, shown_rows, turns_before
from agent_sessions.exceptions import InvalidItem
from agent_sessions.items import EncodedItem, Item, decode, encode_batch
from agent_sessions.items.kinds import (
    CALL_OF,
    KINDS,
    call_key,
    is_opening,
    opens_turn,
    own_key,
    type_and_role,
)
from agent_sessions.models import Branch

# A hosted tool's own calls need no output from here.
_ANSWERED_HERE = frozenset(t for t, kind in KINDS.items() if kind.answered_here)
_DRAWN = ("type", "role", "call_id", "tool_name", "text")


class Row(NamedTuple):
    """A stored row; the fields are the columns to read."""

    position: int
    pk: Any
    turn: int
    data: str
    type: str
    role: str
    call_id: str
    tool_name: str
    text: str
    size: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row; `instead` is the key of the row that it repeats."""

    code: str
    row: Row
    drawn: EncodedItem | None = None
    instead: Any = None


class Reader:
    """Read a branch, remembering only what a later row can depend on.

    Of each call that is a number: 64 bits of its hash, so that a million items need
    some ten megabytes.
    """

    def __init__(
        self, using: str, branch: Branch, inherited: tuple[Segment, ...], size: int
    ) -> None:
        self.using = using
        self.branch = branch
        self.size = size
        self.turn = turns_before(using, inherited)
        self.items = 0
        self.last = 0
        self.wrong_turns = 0
        self.first_wrong_turn: int | None = None
        # Calls without an output so far: their positions.
        self.open: dict[int, int] = {}
        self._calls: set[int] = set()
        # The user's message that comes last, if nothing has followed it.
        self._asked: tuple[Any, Any] | None = None
        if inherited:
            self._inherit(inherited)

    def pages(self) -> Iterator[list[Fault]]:
        """Return the faults of each page of rows."""
        own = shown_rows(self.using, self.branch)
        for page in read_pages(own, Row._fields, self.size):
            yield [fault for values in page for fault in self._read(Row(*values))]

    def _read(self, row: Row) -> Iterator[Fault]:
        self.items += 1
        self.last = row.position
        item = decode(row.data)
        drawn = None if item is None else _draw(item)
        said = drawn or row
        asks = is_opening(said.type, said.role)
        self.turn += asks
        if row.turn != self.turn:
            self.wrong_turns += 1
            if self.first_wrong_turn is None:
                self.first_wrong_turn = row.position
        if item is None:
            yield Fault(_why_unreadable(row.data), row)
            return
        if drawn is not None and not _agree(row, drawn):
            yield Fault("wrong_columns", row, drawn=drawn)
        if type_and_role(item)[0] in CALL_OF:
            if self._is_orphan(item):
                yield Fault("orphan_output", row)
                return
            self.open.pop(hash(call_key(item)), None)
        else:
            self._note(item, row.position)
        if not asks:
            self._asked = None
        elif self._asked is not None and self._asked[0] == item.get("content"):
            yield Fault("duplicate_turn", row, instead=self._asked[1])
        else:
            self._asked = (item.get("content"), row.pk)

    def _is_orphan(self, output: Item) -> bool:
        key = call_key(output)
        # One that names no call, as a hosted tool search's, is sent: windows/links.py.
        return key[1] is not None and hash(key) not in self._calls

    def _note(self, item: Item, position: int) -> None:
        kind, _ = type_and_role(item)
        if kind not in CALL_OF.values():
            return
        key = hash(own_key(item))
        self._calls.add(key)
        if kind in _ANSWERED_HERE and isinstance(item.get("call_id"), str):
            self.open[key] = position

    def _inherit(self, inherited: tuple[Segment, ...]) -> None:
        """Remember the calls that ancestors made, and whether they end with a question."""
        for segment in inherited:
            calls = visible(self.using, (segment,)).filter(
                type__in=set(CALL_OF.values())
            )
            for page in read_pages(calls, ("position", "data"), self.size):
                for _, data in page:
                    if (item := decode(data)) is not None:
                        self._calls.add(hash(own_key(item)))
        rows = visible(self.using, inherited)
        # Not what a repair takes away from there: that does not part two messages.
        for pk, data in rows.order_by("-position").values_list("pk", "data")[:8]:
            item = decode(data)
            if item is None:
                continue
            if type_and_role(item)[0] in CALL_OF and self._is_orphan(item):
                continue
            if opens_turn(item):
                self._asked = (item.get("content"), pk)
            break


def _draw(item: Item) -> EncodedItem | None:
    """Draw an item's columns; None for JSON that is no longer accepted."""
    try:
        return encode_batch([item]).rows[0]
    except InvalidItem:
        return None


def _agree(row: Row, drawn: EncodedItem) -> bool:
    # Text written by other hands may be longer than ours: its own length counts.
    return row.size == len(row.data.encode()) and all(
        getattr(row, name) == getattr(drawn, name) for name in _DRAWN
    )


def columns_of(fault: Fault) -> dict[str, Any]:
    """Return the columns of a row as its data says."""
    assert fault.drawn is not None  # noqa: S101
    drawn = {name: getattr(fault.drawn, name) for name in _DRAWN}
    return {**drawn, "size": len(fault.row.data.encode())}


def _why_unreadable(data: str) -> str:
    try:
        # Raw lone surrogates, which are bytes that are no UTF-8, end here.
        json.loads(data.encode().decode())
    except (ValueError, RecursionError):
        return "unreadable_row"
    return "scalar_row"
