"""A selection that tells when it is asked whether a session is still meant."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from agent_sessions.retention import Selection


class AskedSelection(Selection):
    """Call a function each time; where it returns False, no session is meant."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__()
        self.__dict__["ask"] = ask

    def among(self, using: str, pks: Collection[int]) -> Any:
        rows = super().among(using, pks)
        return rows if self.__dict__["ask"]() else rows.none()
