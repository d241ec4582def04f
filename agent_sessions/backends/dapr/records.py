"""What lies in the state store: a head record, and segments that never change.

The head holds the open segment, so one conditional write commits an append. A full
segment moves to a key of its own, with a name and its number. A new name begins wherever
two writers could disagree on what a segment holds: with a pop, a clear and a batch that
is too large for the head. So a key's content is decided before anyone writes it, and a
writer that is late or was killed can't harm what the head tells of. What the head
doesn't tell of doesn't exist.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
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
_NUMBERS = ("size", "count", "turns", "writes", "created")

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Unreadable(ValueError):
    """A record can't be read; the message says nothing of its content."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored item: its JSON text, its turn and when it was written (s, UTC)."""

    text: str
    turn: int = 0
    created: int = 0


def new_name() -> str:
    """Make a name for a segment or a write, unlike any other of its session."""
    return secrets.token_urlsafe(6)


@dataclass(frozen=True, slots=True)
class Head:
    """The record that says what a session consists of.

    `segments` are the names of the sealed segments, `tail` is what comes after them, and
    `name` is that of the segments to come.
    `garbage` are the places of segments that are to be deleted. `lasts` is until when
    (s) the sealed segments live at least; None means for ever. `fence` is the lease of
    the run that came last: a run that has read the head before can't write it any more.
    """

    size: int
    name: str = field(default_factory=new_name)
    segments: tuple[str, ...] = ()
    count: int = 0
    turns: int = 0
    writes: int = 0
    created: int = 0
    lasts: int | None = None
    fence: int | None = None
    recent: tuple[str, ...] = ()
    garbage: tuple[str, ...] = ()
    tail: tuple[Entry, ...] = ()

    @property
    def sealed(self) -> int:
        return len(self.segments)

    @property
    def is_empty(self) -> bool:
        return not self.tail and not self.segments

    @property
    def places(self) -> list[str]:
        """The end of each sealed segment's key."""
        return [f"{name}:{number}" for number, name in enumerate(self.segments)]

    def marked(self, mark: str) -> Head:
        """Return the head with one more write, named `mark`."""
        recent = (*self.recent, mark)[-RECENT:]
        return replace(self, writes=self.writes + 1, recent=recent)

    def sealing(self, name: str = "") -> tuple[Head, dict[str, bytes]]:
        """Move full segments of the tail out of the head.

        Return the head and the segments, by place. Without a name all that have read
        this head write the same, so it doesn't matter who does.
        """
        name = name or self.name
        full, rest = split(self.tail, self.size)
        segments = (*self.segments, *[name] * len(full))
        head = replace(self, name=name, segments=segments, tail=rest)
        texts = map(encode_segment, full)
        return head, dict(zip(head.places[self.sealed :], texts, strict=True))

    @property
    def is_too_long(self) -> bool:
        return (
            len(self.tail) > 2 * self.size
            or sum(len(entry.text) for entry in self.tail) > HEAD_BYTES
        )


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


def split(
    entries: Sequence[Entry], size: int
) -> tuple[list[tuple[Entry, ...]], tuple[Entry, ...]]:
    """Cut entries into full segments and what is left over.

    Where a segment ends depends on nothing behind it, so it stays as it is whatever
    is appended.
    """
    full: list[tuple[Entry, ...]] = []
    start = length = 0
    for number, entry in enumerate(entries, 1):
        length += len(entry.text)
        if number - start == size or length >= SEGMENT_BYTES:
            full.append(tuple(entries[start:number]))
            start, length = number, 0
    return full, tuple(entries[start:])


def encode_segment(entries: Iterable[Entry]) -> bytes:
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
    record = {each.name: getattr(head, each.name) for each in fields(head)}
    # Runs of one name, so that a head is as long as it is however many segments there are.
    runs = [(len([*run]), name) for name, run in groupby(head.segments)]
    record |= {"version": VERSION, "segments": runs, "tail": _lists(head.tail)}
    return _encode(record).encode()


def decode_head(data: bytes, size: int) -> Head:
    """Read a head, or the SDK's one list of all items as one. Raises Unreadable."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise Unreadable("It is no JSON.") from None
    if isinstance(record, list):
        texts = (
            value if isinstance(value, str) else _encode(value) for value in record
        )
        tail = tuple(map(Entry, texts))
        return Head(size, count=len(tail), tail=tail, created=int(time.time()))
    if not isinstance(record, dict) or record.pop("version", None) != VERSION:
        raise Unreadable("It is of another kind or version.")
    try:
        if any(type(record[name]) is not int for name in _NUMBERS):
            raise TypeError
        record["segments"] = tuple(
            str(name) for length, name in record["segments"] for _ in range(length)
        )
        record |= {name: tuple(record[name]) for name in ("recent", "garbage")}
        return Head(**{**record, "tail": _entries(record["tail"])})
    except (KeyError, TypeError, ValueError):
        raise Unreadable("Parts of it are missing.") from None


def _lists(entries: Iterable[Entry]) -> list[tuple[int, int, str]]:
    return [(entry.created, entry.turn, entry.text) for entry in entries]


def _entries(values: Any) -> tuple[Entry, ...]:
    if not isinstance(values, list):
        raise Unreadable("It is no list.")
    return tuple(map(_entry, values))


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
