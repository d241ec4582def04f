"""What of a response is open, and what of it has been shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["message", "reasoning", "call"]


@dataclass(slots=True)
class OpenItem:
    """A message, a reasoning or a tool call that has started and not ended."""

    kind: Kind
    id: str
    raw_id: str
    started: bool = True
    filled: bool = False
    part: tuple[str, int] | None = None


@dataclass(slots=True)
class Response:
    """What has been shown of the response that streams, so as not to repeat it."""

    shown: list[tuple[Kind, str, str | None]] = field(default_factory=list)

    def was_shown(self, kind: Kind, raw_id: str, text: str | None) -> bool:
        """Return whether an item was shown, and strike it from the list."""
        for entry in self.shown:
            if entry[:2] == (kind, raw_id) and entry[2] in (None, text):
                self.shown.remove(entry)
                return True
        return False
