"""What lies in the state store: a head record, and segments that never change.

The head holds the open segment, so one conditional write commits an append. A full
segment moves to a key of its own, named after its number and a generation. A new
generation begins wherever two writers could disagree on what a segment holds: with a
pop, a clear and a batch that is too large for the head. So a key's content is decided
before anyone writes it, and a writer that is late or was killed can't harm what the
head tells of. What the head doesn't tell of doesn't exist.
"""

from __future__ import annotations

import json
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from agent_sessions.backends.base import SessionKey
from agent_sessions.items import decode

# A segment is full with as many entries as the head says, or with this many bytes.
SEGMENT_BYTES = 64 * 1024
# More than this, or than two segments' entries, a head doesn't carry. Sidecars take
# requests of 4 MB, and an escaped text may be twice as long.
HEAD_BYTES = 512 * 1024
# How many of the last writes the head names, so that a writer whose connection broke
# can tell whether its own arrived.
RECENT = 8
VERSION = 1

_encode = json.JSONEncoder(separators=(",", ":")).encode

Generations = tuple[tuple[int, str], ...]


class Unreadable(ValueError):
    """A record can't be read; the message says nothing of its content."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored item: its JSON text, its turn and when it was written (s, UTC)."""

    text: str
    turn: int = 0
    created: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The record that says what a session consists of.

    `generations` are pairs of a segment's number and the name that holds from there
    on; segments below `sealed` lie under keys of their own, `tail` is what comes after
    them. `garbage` are stretches of segments that are to be deleted, as generation,
    first number and the number behind the last. `lasts` is until when (s) the sealed
    segments live at least; None means for ever. `fence` is the lease of the run that
    came last: a run that has read the head before can't write it any more.
    """

    size: int
    generations: Generations
    sealed: int = 0
    count: int = 0
    turns: int = 0
    writes: int = 0
    created: int = 0
    lasts: int | None = None
    fence: int | None = None
    recent: tuple[str, ...] = ()
    garbage: tuple[tuple[str, int, int], ...] = ()
    tail: tuple[Entry, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.tail and not self.sealed

    def generation_of(self, number: int) -> str:
        """Name the generation of a segment."""
        found = bisect_right(self.generations, number, key=lambda pair: pair[0])
        return self.generations[found - 1][1]

    def assigned(self, first: int, stop: int | None, name: str) -> Generations:
        """Return the generations with another name for a stretch of segments."""
        before = tuple(pair for pair in self.generations if pair[0] < first)
        if stop is None:
            return (*before, (first, name))
        after = tuple(pair for pair in self.generations if pair[0] > stop)
        return (*before, (first, name), (stop, self.generation_of(stop)), *after)

    def stretches(self, first: int, stop: int) -> tuple[tuple[str, int, int], ...]:
        """Return which segments of which generations lie between two numbers."""
        bounds = [pair[0] for pair in self.generations if first < pair[0] < stop]
        edges = [first, *bounds, stop] if first < stop else []
        return tuple(
            (self.generation_of(begin), begin, end) for begin, end in pairwise(edges)
        )

    def marked(self, mark: str) -> Head:
        """Return the head with one more write, named `mark`."""
        recent = (*self.recent, mark)[-RECENT:]
        return replace(self, writes=self.writes + 1, recent=recent)


def new_name() -> str:
    """Make a name for a generation or a write, unlike any other of its session."""
    return secrets.token_urlsafe(6)


def new_head(size: int, created: int) -> Head:
    """Make the head of a session that has nothing yet."""
    return Head(size=size, generations=((0, new_name()),), created=created)


def head_key(key: SessionKey, namespace: str = "") -> str:
    """Name a session's head record, as the SDK does where there is no owner.

    `namespace` is the alias that wraps the backend. The ends of the forms differ, and
    neither it nor an owner's part holds a colon, so no two sessions have the same key.
    """
    session_id = key.session_id
    owner = None if key.user_id is None else _part(str(key.user_id))
    if namespace:
        alias = _part(namespace)
        if owner is None:
            return f"{_quoted(session_id)}:in:{alias}:wrapped"
        return f"{_quoted(session_id)}:user:{owner}:in:{alias}:wrapped-owned"
    if owner is not None:
        return f"{_quoted(session_id)}:user:{owner}:owned"
    if "||" in session_id:
        # Dapr refuses it in keys, so the SDK can't have stored such an id.
        return f"{_quoted(session_id)}:quoted"
    return f"{session_id}:messages"


def metadata_key(key: str) -> str | None:
    """Name the record with the times that the SDK's class writes beside its own."""
    if not key.endswith(":messages"):
        return None
    return f"{key.removesuffix(':messages')}:metadata"


def segment_key(key: str, generation: str, number: int) -> str:
    """Name a segment of the session whose head has this key."""
    return f"{key}:{generation}:{number}"


def split(
    entries: Sequence[Entry], size: int
) -> tuple[list[tuple[Entry, ...]], tuple[Entry, ...]]:
    """Cut entries into full segments and what is left over.

    Where a segment ends depends on nothing behind it, so it stays as it is whatever
    is appended.
    """
    full: list[tuple[Entry, ...]] = []
    start = length = 0
    for index, entry in enumerate(entries, 1):
        length += len(entry.text)
        if index - start >= size or length >= SEGMENT_BYTES:
            full.append(tuple(entries[start:index]))
            start, length = index, 0
    return full, tuple(entries[start:])


def is_too_long(tail: Sequence[Entry], size: int) -> bool:
    """Return whether a tail is more than a head should carry."""
    return len(tail) > 2 * size or sum(len(entry.text) for entry in tail) > HEAD_BYTES


def encode_segment(entries: Iterable[Entry]) -> bytes:
    """Write down a segment."""
    return _encode(_lists(entries)).encode()


def decode_segment(data: bytes) -> tuple[Entry, ...]:
    """Read a segment. Raises Unreadable."""
    try:
        return _entries(json.loads(data))
    except (ValueError, RecursionError):
        raise Unreadable("It is no list of entries.") from None


def unreadable_text(data: bytes) -> str:
    """Return what lies in the place of a segment, in a form that is never an item."""
    text = data.decode(errors="replace")
    return text if decode(text) is None else _encode(text)


def encode_head(head: Head) -> bytes:
    """Write down a head."""
    record = {each.name: getattr(head, each.name) for each in fields(head)}
    record |= {"version": VERSION, "tail": _lists(head.tail)}
    return _encode(record).encode()


def decode_head(data: bytes, size: int) -> Head:
    """Read a head, or the SDK's one list of all items as one. Raises Unreadable."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise Unreadable("It is no JSON.") from None
    if isinstance(record, list):
        return _from_sdk(record, size)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise Unreadable("It is of another kind or version.")
    try:
        return Head(
            size=int(record["size"]),
            generations=tuple((int(n), str(name)) for n, name in record["generations"]),
            sealed=int(record["sealed"]),
            count=int(record["count"]),
            turns=int(record["turns"]),
            writes=int(record["writes"]),
            created=int(record["created"]),
            lasts=record["lasts"],
            fence=record.get("fence"),
            recent=tuple(record["recent"]),
            garbage=tuple((str(g), int(n), int(m)) for g, n, m in record["garbage"]),
            tail=_entries(record["tail"]),
        )
    except (KeyError, TypeError, ValueError):
        raise Unreadable("Parts of it are missing.") from None


def is_from_sdk(data: bytes) -> bool:
    """Return whether a record that can be read is the SDK's."""
    return data.lstrip()[:1] == b"["


def _from_sdk(record: list[Any], size: int) -> Head:
    tail = tuple(
        Entry(value if isinstance(value, str) else _encode(value)) for value in record
    )
    return replace(new_head(size, 0), count=len(tail), tail=tail)


def _lists(entries: Iterable[Entry]) -> list[tuple[int, int, str]]:
    return [(entry.created, entry.turn, entry.text) for entry in entries]


def _entries(values: Any) -> tuple[Entry, ...]:
    if not isinstance(values, list):
        raise Unreadable("It is no list.")
    return tuple(_entry(value) for value in values)


def _entry(value: Any) -> Entry:
    if isinstance(value, list) and len(value) == 3 and isinstance(value[2], str):
        created, turn, text = value
        return Entry(text, int(turn or 0), int(created or 0))
    # Kept as it is, to be read or passed over like any other item's text.
    return Entry(_encode(value))


def _part(text: str) -> str:
    return _quoted(text).replace(":", "%3A")


def _quoted(text: str) -> str:
    return text.replace("%", "%25").replace("|", "%7C")
