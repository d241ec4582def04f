"""The SDK's items: as stored rows, by their types, as text. No Django, no SDK."""

from __future__ import annotations

from agent_sessions.items.codec import (
    MAX_DEPTH,
    Batch,
    EncodedItem,
    LongBatch,
    StoredItem,
    as_sequence,
    decode,
    decode_all,
    encode_batch,
    encode_texts,
    look_through,
)
from agent_sessions.items.text import (
    TEXT_LENGTH,
    Item,
    clean_text,
    first_line,
    text_of,
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
]
