"""Turn the texts of a source into rows, those that can't be read included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_sessions.exceptions import InvalidItem
from agent_sessions.items import Batch, EncodedItem, decode, encode_batch
from agent_sessions.transfer.import_.records import SourceItem


@dataclass(frozen=True, slots=True)
class Page:
    """A page of rows, and how many of them were kept as they were."""

    batch: Batch
    verbatim: int


def encode_page(items: Sequence[SourceItem]) -> Page:
    """Encode a page of a source's items; what isn't an item stays as it is."""
    decoded: list[Any] = [decode(item.data) for item in items]
    try:
        return Page(encode_batch(decoded), 0)
    except InvalidItem:
        return _one_by_one(items, decoded)


def _one_by_one(items: Sequence[SourceItem], decoded: list[Any]) -> Page:
    rows: list[EncodedItem] = []
    turns = verbatim = 0
    title = ""
    for source, item in zip(items, decoded, strict=True):
        try:
            batch = encode_batch([item])
        except InvalidItem:
            verbatim += 1
            rows.append(EncodedItem(source.data, turns, "", "", "", "", ""))
            continue
        turns += batch.turns
        title = title or batch.title
        rows.append(batch.rows[0]._replace(turn=turns))
    return Page(Batch(tuple(rows), turns, title), verbatim)
