"""Write a transcript as Markdown: pure functions, item by item, memory stays flat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from agent_sessions.characters import printable_lines
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import HANDOFF_PREFIX
from agent_sessions.times import aware
from agent_sessions.transcript import IDLE_GAP, parse
from agent_sessions.transcript.parts import Entry, Kind, Part, PartKind, parts_up_to

# Characters of one part; the whole is in the JSON export.
PART_LENGTH = 1_000_000
# Calls whose output is awaited; an older one's output goes without its name.
_OPEN_CALLS = 1_000

_TITLES = {
    Kind.SYSTEM: "System",
    Kind.REASONING: "Reasoning",
    Kind.CALL: "Tool",
    Kind.OUTPUT: "Tool output",
    Kind.APPROVAL: "Approval",
    Kind.MARKER: "History",
    Kind.ENCRYPTED: "Encrypted",
    Kind.UNREADABLE: "Unreadable item",
    Kind.UNKNOWN: "Unknown item",
}
_MARKERS = {
    "compaction": "History compacted here",
    "compaction_trigger": "Compaction asked for",
    "item_reference": "Reference to item",
}
_MEDIA = {
    PartKind.IMAGE: "Image",
    PartKind.IMAGE_LINK: "Image",
    PartKind.AUDIO: "Audio",
    PartKind.FILE: "File",
    PartKind.LINK: "Source",
}
_FENCED = frozenset({PartKind.TEXT, PartKind.REFUSAL, PartKind.CODE})


def markdown(
    stored: Iterable[StoredItem],
    *,
    title: str = "",
    facts: Iterable[tuple[str, str]] = (),
) -> Iterator[str]:
    """Write items, oldest first, as lines of Markdown without their line ends.

    `title` and `facts` (name, value) make a heading before them. What the items hold
    stands in code fences and code spans, inert: it can make no heading, load no image,
    run no HTML and move no terminal's cursor. Invisible characters are replaced.
    """
    if title:
        yield from (f"# {_span(title)}", "")
    listed = [f"- {name}: {_span(value)}" for name, value in facts if value]
    if listed:
        yield from (*listed, "")
    calls: dict[str, str] = {}
    previous: datetime | None = None
    for row in stored:
        if previous is not None and row.created_at - previous > IDLE_GAP:
            minutes = int((row.created_at - previous).total_seconds() // 60)
            yield from (f"*{minutes} minutes later*", "")
        previous = row.created_at
        with parts_up_to(PART_LENGTH):
            entry = parse(row.item, row.raw)
        name = _name(entry, calls)
        yield from _heading(row, entry, name)
        yield from _body(entry)
        if entry.handoff and name.startswith(HANDOFF_PREFIX):
            yield from (f"*Handoff to {_span(entry.handoff)}*", "")


def _name(entry: Entry, calls: dict[str, str]) -> str:
    """Return a tool's name, for an output from its call."""
    if entry.kind is Kind.CALL and entry.call_id:
        calls[entry.call_id] = entry.name
        if len(calls) > _OPEN_CALLS:
            del calls[next(iter(calls))]
    if entry.kind is Kind.OUTPUT:
        return calls.pop(entry.call_id, "") or entry.name
    return entry.name


def _heading(row: StoredItem, entry: Entry, name: str) -> Iterator[str]:
    words = [f"## {row.position}. {_title(entry)}"]
    if name:
        words.append(_span(name))
    if entry.server:
        words.append(f"on {_span(entry.server)}")
    if entry.call_id:
        words.append(f"({_span(entry.call_id)})")
    if entry.status and entry.status != "completed":
        words[-1] += f": {_span(entry.status)}"
    yield " ".join(words)
    yield ""
    yield f"{aware(row.created_at).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    yield ""


def _title(entry: Entry) -> str:
    if entry.kind is Kind.MESSAGE:
        known = {"user": "User", "assistant": "Assistant"}
        return known.get(entry.role) or _span(entry.role)
    return _TITLES[entry.kind]


def _body(entry: Entry) -> Iterator[str]:
    if entry.kind is Kind.MARKER:
        reference = f" {_span(entry.id)}" if entry.id else ""
        yield from (f"*{_MARKERS[entry.type]}*{reference}", "")
    elif entry.kind is Kind.UNKNOWN:
        yield from (f"Type {_span(entry.type or '?')}", "")
    for part in entry.arguments:
        yield from ("Arguments:", "")
        yield from _part(part)
    if entry.parts and entry.arguments and entry.kind is Kind.CALL:
        yield from ("Output:", "")
    for part in entry.parts:
        yield from _part(part)


def _part(part: Part) -> Iterator[str]:
    if part.kind in _FENCED:
        if part.kind is PartKind.REFUSAL:
            yield from ("Refused:", "")
        if part.label:
            yield from (f"{_span(part.label)}:", "")
        yield from _fence(part.text)
        if part.size:
            yield from (f"*Cut; the whole has {part.size} characters.*", "")
    elif part.kind is PartKind.ENCRYPTED:
        yield from (f"*Encrypted, {part.size} characters*", "")
    elif part.kind is PartKind.MORE:
        yield from (f"*and {part.size} more parts*", "")
    else:
        words = [f"{_MEDIA[part.kind]}:"]
        words += [_span(text) for text in (part.label, part.text) if text]
        if part.size:
            words.append(f"({part.size} bytes)")
        yield from (" ".join(words), "")


def _fence(text: str) -> Iterator[str]:
    """Return a text between fences that it can't close."""
    text = printable_lines(text)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}text"
    yield from text.split("\n")
    yield fence
    yield ""


def _span(text: str) -> str:
    """Return a text as a code span of one line that it can't close."""
    line = " ".join(printable_lines(text).split())
    longest = max(map(len, re.findall(r"`+", line)), default=0)
    ticks = "`" * (longest + 1)
    # A span that begins or ends with a tick needs room; so does one of nothing.
    room = " " if not line or line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{room}{line}{room}{ticks}"
