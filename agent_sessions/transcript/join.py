"""Put the items of a page together: calls with outputs, gaps, handoffs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from agent_sessions.items import StoredItem
from agent_sessions.transcript.entries import Entry, Kind, Part, PartKind
from agent_sessions.transcript.parse import parse

IDLE_GAP = timedelta(minutes=5)
HANDOFF_PREFIX = "transfer_to_"
# Characters of images that one page carries; the rest are linked.
IMAGES_LENGTH = 4_000_000
# Characters of texts that one page carries, and what is left of those after them.
TEXTS_LENGTH = 1_000_000
REST_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Line:
    """An entry in its place.

    `output` is the call's own, if it lies on the same page. `idle_since` is set where
    nothing happened for a while before. `handoff` names the agent that took over.
    """

    position: int
    turn: int
    created_at: datetime
    entry: Entry
    output: Entry | None = None
    output_position: int | None = None
    idle_since: datetime | None = None
    handoff: str = ""


def join(stored: Iterable[StoredItem]) -> list[Line]:
    """Turn a page of a history, oldest first, into what is shown."""
    lines: list[Line] = []
    calls: dict[str, int] = {}
    previous: datetime | None = None
    budget = _Budget()
    for row in stored:
        entry = budget.fit(parse(row.item, row.raw))
        gap = previous is not None and row.created_at - previous > IDLE_GAP
        since = previous if gap else None
        previous = row.created_at
        if entry.kind is Kind.OUTPUT and entry.call_id in calls:
            index = calls.pop(entry.call_id)
            lines[index] = _answered(lines[index], entry, row.position)
            continue
        if entry.kind is Kind.CALL and entry.call_id:
            calls[entry.call_id] = len(lines)
        lines.append(
            Line(row.position, row.turn, row.created_at, entry, idle_since=since)
        )
    return lines


def _answered(call: Line, output: Entry, position: int) -> Line:
    is_handoff = (
        call.entry.type == "function_call"
        and call.entry.name.startswith(HANDOFF_PREFIX)
        and output.type == "function_call_output"
    )
    return replace(
        call,
        output=output,
        output_position=position,
        handoff=output.handoff if is_handoff else "",
    )


class _Budget:
    """Keep a page within what a server writes and a browser takes easily."""

    def __init__(self) -> None:
        self._images = 0
        self._texts = 0

    def fit(self, entry: Entry) -> Entry:
        return replace(
            entry,
            arguments=tuple(map(self._fit, entry.arguments)),
            parts=tuple(map(self._fit, entry.parts)),
        )

    def _fit(self, part: Part) -> Part:
        self._images += len(part.src)
        if part.src and self._images > IMAGES_LENGTH:
            part = replace(part, kind=PartKind.IMAGE_LINK, src="")
        self._texts += len(part.text)
        if self._texts > TEXTS_LENGTH and len(part.text) > REST_LENGTH:
            size = part.size or len(part.text)
            part = replace(part, text=part.text[:REST_LENGTH], size=size)
        return part
