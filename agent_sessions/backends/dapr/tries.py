"""What is known of a change whose writes may have arrived without an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_sessions.backends.dapr.records import RECENT, Head
from agent_sessions.backends.dapr.sidecar import TRIES, Unreachable
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Item

_CROWDED = "The session is being changed by too many others at once."


@dataclass(frozen=True, slots=True)
class Draft:
    """What a change is to write: segments first, by key, and then the head."""

    head: Head
    segments: Mapping[str, bytes] = field(default_factory=dict)
    item: Item | None = None
    count: int = 0


class Tries:
    """What one change has tried so far, of which some may have arrived unheard."""

    def __init__(self) -> None:
        self._written: set[str] = set()
        self._drafts: dict[str, Draft] = {}
        self._doubts = 0
        self._writes = 0

    def refused(self, draft: Draft) -> None:
        """Note that a draft's head was refused; its segments may lie there.

        So may the head: the sidecar and clients try again by themselves, and are then
        told of their own first write.
        """
        self._written |= draft.segments.keys()
        self._drafts[draft.head.recent[-1]] = draft

    def doubt(self, head: Head, draft: Draft, exc: Unreachable) -> None:
        """Note that nobody knows whether a draft of a head was written.

        Raises StorageError where that was so too often.
        """
        self.refused(draft)
        if not self._doubts:
            self._writes = head.writes
        self._doubts += 1
        if self._doubts >= TRIES:
            raise self.failure(exc) from exc

    def arrived(self, head: Head) -> Draft | None:
        """Return the draft that was written although no answer said so."""
        for mark, draft in self._drafts.items():
            if mark in head.recent:
                return draft
        if self._doubts and head.writes - self._writes > RECENT:
            raise self.failure(None)
        return None

    def failure(self, exc: Unreachable | None) -> StorageError:
        """Make the error for a change that is given up."""
        if self._doubts:
            return Unreachable(
                f"{exc or _CROWDED} The last change is stored whole or not at all, but "
                "which of both is not known. Read the session before you write it again."
            )
        if exc is not None:
            return Unreachable(f"{exc} Nothing was written; try again.")
        return StorageError(
            f"{_CROWDED} Nothing was written; try again later, or write from fewer "
            "places."
        )

    def stale(self, head: Head) -> set[str]:
        """Return the keys of segments that were written and that no head tells of."""
        stale = set()
        for key in self._written:
            generation, number = key.rsplit(":", 2)[1:]
            if (
                int(number) >= head.sealed
                or head.generation_of(int(number)) != generation
            ):
                stale.add(key)
        return stale
