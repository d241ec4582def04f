"""The SDK's items as stored rows, and back: pure functions, no Django, no SDK."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from jiter import from_json

from agent_sessions.items.kinds import is_opening, opens_turn, tool_name, type_and_role
from agent_sessions.items.text import (
    TEXT_LENGTH,
    Item,
    clean_text,
    column,
    first_line,
    text_of,
    title_of,
)

__all__ = [
    "MAX_DEPTH",
    "TEXT_LENGTH",
    "Batch",
    "EncodedItem",
    "Item",
    "LongBatch",
    "StoredItem",
    "as_sequence",
    "clean_text",
    "decode",
    "decode_all",
    "encode_batch",
    "encode_texts",
    "first_line",
    "look_through",
    "text_of",
    "title_of",
]

NAME_LENGTH = 255
KIND_LENGTH = 64
ROLE_LENGTH = 32
# Python's JSON reader stops at a depth that depends on how deep its caller is, so an
# item could be written and then not be read back: this is well below.
MAX_DEPTH = 200

# ASCII escapes carry NUL and lone surrogates, which PostgreSQL's and MariaDB's text
# can't; NaN and Infinity are no JSON, so strict readers would choke on them.
_encode = json.JSONEncoder(
    ensure_ascii=True, check_circular=False, allow_nan=False, separators=(",", ":")
).encode


class EncodedItem(NamedTuple):
    """One item as it is stored: its JSON text and the columns drawn from it.

    `text` is the beginning of a message's text, up to 200 characters.
    """

    data: str
    turn: int
    type: str
    role: str
    call_id: str
    tool_name: str
    text: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A whole `add_items` call, encoded.

    `turns` is the number of turns that it begins; an item's `turn` counts from 0,
    the turn that was open before the batch.
    """

    rows: tuple[EncodedItem, ...]
    turns: int
    title: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EncodedItem]:
        return iter(self.rows)


@dataclass(frozen=True, slots=True)
class LongBatch:
    """A Batch whose items are encoded one by one, whenever its rows are read.

    Reading them raises InvalidItem as encode_batch() does.
    """

    items: Sequence[Any]
    turns: int
    title: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[EncodedItem]:
        return _encoded(self.items)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item read back with its place; `item` is None where the row is unreadable.

    What was encrypted has the id of its envelope. What doesn't open `is_closed`; where
    that is for want of a key, `item` is the envelope and `missing_key` the key's id.
    """

    position: int
    turn: int
    item: Item | None
    raw: str
    created_at: datetime
    envelope_id: str = ""
    is_closed: bool = False
    missing_key: str = ""
    # Under which a client knows the message, and the agent that gave it, where a run
    # has written that down.
    message_id: str = ""
    agent_name: str = ""
    # The place of a turn among the branches that leave its own there.
    siblings: dict[str, Any] | None = None
    # Whether the time is the item's own, and so stays.
    is_timed: bool = True


def as_sequence(items: Any) -> Sequence[Any]:
    """Return the items of one `add_items` call; what is no list or tuple is read once.

    Raises InvalidItem for a single item, a text, and what holds no items at all.
    """
    if isinstance(items, list | tuple):
        return items
    if not items:
        return ()
    if not isinstance(items, Iterable) or isinstance(items, Mapping | str | bytes):
        raise _invalid(
            f"Items are a list, not a {type(items).__name__}. Give a list of the SDK's "
            "input items; nothing was written."
        )
    return list(items)


def encode_batch(items: Sequence[Any]) -> Batch:
    """Encode the items of one `add_items` call.

    Raises InvalidItem, naming the first item that isn't a JSON object.
    """
    rows = tuple(_encoded(items))
    title = title_of(row.text for row in rows if is_opening(row.type, row.role))
    return Batch(rows, rows[-1].turn if rows else 0, title)


def look_through(items: Sequence[Any]) -> LongBatch:
    """Return what the items of one `add_items` call do to a session, unencoded."""
    opening = [item for item in items if isinstance(item, dict) and opens_turn(item)]
    title = title_of(text_of(item, TEXT_LENGTH) for item in opening)
    return LongBatch(items, len(opening), title)


def encode_texts(items: Sequence[Any]) -> list[str]:
    """Write the items of one `add_items` call as JSON. Raises InvalidItem."""
    return [_encode_one(items, index) for index in range(len(items))]


def _encoded(items: Sequence[Any]) -> Iterator[EncodedItem]:
    turns = 0
    for index, item in enumerate(items):
        data = _encode_one(items, index)
        kind, role = type_and_role(item)
        turns += is_opening(kind, role)
        yield EncodedItem(
            data,
            turns,
            kind[:KIND_LENGTH],
            role[:ROLE_LENGTH],
            column(item.get("call_id"))[:NAME_LENGTH],
            tool_name(item, kind)[:NAME_LENGTH],
            text_of(item, TEXT_LENGTH) if kind == "message" else "",
        )


def _encode_one(items: Sequence[Any], index: int) -> str:
    item = items[index]
    if not isinstance(item, dict):
        raise _invalid(
            f"Item {index} of {len(items)} is a {type(item).__name__}, not a dict. "
            "Give a list of the SDK's input items; nothing was written."
        )
    try:
        data = _encode(item)
    except (TypeError, ValueError, RecursionError) as exc:
        # The cause is told by its type alone: its text may quote the content.
        raise _invalid(
            f"Item {index} of {len(items)} is not JSON "
            f"({_reason(exc)}). Replace NaN, Infinity and Python objects by plain "
            "JSON values; nothing was written."
        ) from None
    if _too_deep(item, data):
        raise _invalid(
            f"Item {index} of {len(items)} is nested more than {MAX_DEPTH} levels "
            "deep. Flatten it, or store it as a string; nothing was written."
        )
    return data


def decode(data: Any) -> Item | None:
    """Read a stored row; None where it is no JSON object."""
    return next(iter(decode_all((data,))), None)


def decode_all(rows: Iterable[Any]) -> list[Item]:
    """Read stored rows in their order, passing over the unreadable ones."""
    items: list[Item] = []
    for data in rows:
        try:
            encoded = data if isinstance(data, bytes) else data.encode()
        except (UnicodeEncodeError, AttributeError):
            # A raw lone surrogate stands for a byte that is no UTF-8.
            continue
        try:
            # Keys are few; a cache of values would hold on to what people wrote.
            item = from_json(encoded, cache_mode="keys")
        except ValueError:
            item = _decode_slowly(encoded)
        if isinstance(item, dict):
            items.append(item)
    return items


def _decode_slowly(data: bytes) -> Any:
    """Read what the fast reader refuses, such as escaped lone surrogates."""
    try:
        # From bytes it would guess at encodings, and take a byte order mark.
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def _too_deep(item: Item, data: str) -> bool:
    # Few brackets can't nest deeply, and that is true of nearly every item.
    if data.count("{") + data.count("[") <= MAX_DEPTH:
        return False
    level: list[Any] = [item]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list | tuple)
        ]
        if not level:
            return False
    return True


def _reason(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, TypeError):
        return "a value of a type that JSON lacks"
    return "NaN, Infinity or a circular reference"


def _invalid(message: str) -> Exception:
    # Imported late: the errors are Django's too, and items are read without Django.
    from agent_sessions.exceptions import InvalidItem

    return InvalidItem(message)
