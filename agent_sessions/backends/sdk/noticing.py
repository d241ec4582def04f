"""What a run knows of the end of its history, so that it notices writes of others.

A session class can't compare a lease in the same step as it writes. A run that has lost
its lease in another process may therefore write once more, after the next run has read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from hashlib import blake2b

from agent_sessions.items import Item

logger = logging.getLogger("agent_sessions.backends")

# How many of the newest items are known.
_KNOWN = 100


class RunView:
    """The newest items as one run has read and written them."""

    def __init__(self, fence: int) -> None:
        self.fence = fence
        # Digests, oldest first; None before the first read.
        self._tail: list[bytes] | None = None
        self._is_all = False

    def wrote(self, items: Sequence[Item]) -> None:
        """Note what the run has added."""
        if self._tail is not None:
            self._keep([*self._tail, *map(_digest, items)], is_all=self._is_all)

    def popped(self) -> None:
        """Note that the run has taken the newest item."""
        if self._tail:
            self._tail.pop()
        elif not self._is_all:
            self._tail = None

    def cleared(self) -> None:
        """Note that the run has removed everything."""
        self._keep([], is_all=True)

    def read(self, items: Sequence[Item], *, is_all: bool, alias: str) -> None:
        """Compare what the run reads with what it knows, and know that from now on."""
        known, was_all = self._tail, self._is_all
        self._keep([_digest(item) for item in items], is_all=is_all)
        found = self._tail or []
        if known is None:
            return
        length = min(len(known), len(found))
        differs = found[len(found) - length :] != known[len(known) - length :]
        if was_all and self._is_all:
            differs = found != known
        if differs:
            logger.warning(
                "The history of a session in %r changed beside the run under lease %d: "
                "by hand, or by a run that was writing as it lost its lease",
                alias,
                self.fence,
            )

    def _keep(self, digests: list[bytes], *, is_all: bool) -> None:
        self._tail = digests[-_KNOWN:]
        self._is_all = is_all and len(digests) <= _KNOWN


def _digest(item: Item) -> bytes:
    text = json.dumps(item, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
