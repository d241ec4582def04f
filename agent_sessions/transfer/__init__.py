"""Export, import and copy sessions, with a report of what was or would be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Characters of a session's name that are told.
_NAME_LENGTH = 255


@dataclass(slots=True)
class Report:
    """Counts of one call; what a call doesn't do stays 0."""

    # Told a line for each session that was left as it is.
    tell: Callable[[str], object] = lambda line: None
    refused: int = 0
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

    def refuse(self, session_id: Any, reason: str) -> None:
        """Name a session that is left, and why."""
        self.refused += 1
        name = str(session_id)
        if len(name) > _NAME_LENGTH:
            name = f"{name[:_NAME_LENGTH]}…"
        self.tell(f"{name}: refused: {reason}")
