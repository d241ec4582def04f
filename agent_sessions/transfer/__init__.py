"""Export, import and copy sessions, with a report of what was or would be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Sessions that a report names, and the characters of each name.
MOST_REFUSED = 10_000
_NAME_LENGTH = 255


@dataclass(slots=True)
class Report:
    """Counts of one call; what a call doesn't do stays 0."""

    # Sessions that were made, that were completed, and that had nothing new.
    made: int = 0
    grown: int = 0
    unchanged: int = 0
    items: int = 0
    branches: int = 0
    runs: int = 0
    # Sessions that were removed from where they were copied from.
    moved: int = 0
    # Sessions that are encrypted in their store, and in clear in an export.
    opened: int = 0
    # Items that can't be read, and were kept as they are.
    unreadable: int = 0
    # Items that the source itself shows nowhere.
    left_out: int = 0
    # Sessions that were left as they are, and why.
    refused: dict[str, str] = field(default_factory=dict)
    # How many more there were, once as many as MOST_REFUSED are named.
    more_refused: int = 0
    # Sessions that were asked for by id, and that the source doesn't have.
    missing: set[str] = field(default_factory=set)
    # Sessions with other branches than the one that was copied.
    branched: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """Count the sessions that were wanted and not transferred."""
        return len(self.refused) + self.more_refused + len(self.missing)

    def refuse(self, session_id: Any, reason: str) -> None:
        """Name a session that is left, and why; memory stays bounded."""
        name = str(session_id)
        if len(name) > _NAME_LENGTH:
            name = f"{name[:_NAME_LENGTH]}…"
        if name in self.refused or len(self.refused) >= MOST_REFUSED:
            self.more_refused += 1
        else:
            self.refused[name] = reason

    def refusals(self) -> Iterator[str]:
        """Return a line for each session that is left."""
        for session_id, reason in self.refused.items():
            yield f"{session_id}: refused: {reason}"
        if self.more_refused:
            yield f"and {self.more_refused} more: refused."
        for session_id in sorted(self.missing):
            yield f"{session_id}: the source has no such session."
