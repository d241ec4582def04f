"""Read whole histories, and tell whether two of them say the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from agent_sessions.items import Item, StoredItem, text_of
from agent_sessions.items.kinds import type_and_role


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How many items a history has, and a hash over all of them."""

    count: int
    digest: str


class Hasher:
    """Makes the fingerprint of a history, item by item.

    `exact` compares items as the SDK does, by their JSON with sorted keys. Else only
    what they say: for stores that write items anew.
    """

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self.count = 0
        self._hash = hashlib.sha256()

    def add(self, item: Item) -> str:
        """Add an item; give what it alone is compared by."""
        text = json.dumps(item if self.exact else _gist(item), sort_keys=True)
        self._hash.update(f"{len(text)}:{text}".encode())
        self.count += 1
        return text

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.count, self._hash.hexdigest())


def batches(
    items: Iterable[StoredItem], size: int, most_bytes: int = 4 * 1024 * 1024
) -> Iterator[list[StoredItem]]:
    """Put items together, up to so many and so long."""
    batch: list[StoredItem] = []
    length = 0
    for item in items:
        if batch and (len(batch) == size or length + len(item.raw) > most_bytes):
            yield batch
            batch, length = [], 0
        batch.append(item)
        length += len(item.raw)
    if batch:
        yield batch


def _gist(item: Item) -> list[Any]:
    kind, role = type_and_role(item)
    text = text_of(item) if kind == "message" else ""
    names = ("call_id", "name", "arguments", "output")
    return [kind, role, text, *(item.get(name) for name in names)]
