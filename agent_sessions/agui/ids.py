"""Which ids go out: an item's own where it is unique, else one that we make.

An item's own id is used where it looks made at random (20 characters or more, two
digits or more among them), because then the stream and every later snapshot can both
use it. Ids that models make up (`__fake_id__`, `msg_1`) repeat from answer to answer,
and a client would join the messages that share one. For these the stream says
`<run id>/<n>` and a snapshot `item-<position>`; each is stable in its own place.
Tool calls keep their call id everywhere: approvals and results refer to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SHORTEST_UNIQUE_ID = 20
LONGEST_ID = 255


def own_id(value: Any) -> str | None:
    """Return an id if it looks unique in the world, else None."""
    if (
        isinstance(value, str)
        and SHORTEST_UNIQUE_ID <= len(value) <= LONGEST_ID
        and value.isascii()
        and value.isprintable()
        and sum(map(str.isdigit, value)) >= 2
    ):
        return value
    return None


def result_id(call_id: str) -> str:
    """Name the message that holds a tool call's result."""
    return f"{call_id}:result"


class IdPool:
    """Hands out ids, each one once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def take(self, wanted: str | None, fallback: str) -> str:
        """Return the wanted id if there is one and it is free, else the fallback."""
        chosen = wanted if wanted and wanted not in self._taken else fallback
        number = 1
        name = chosen
        while name in self._taken:
            number += 1
            name = f"{chosen}.{number}"
        self._taken.add(name)
        return name
