"""Rate limits in tests, whose minutes don't end in the middle."""

from __future__ import annotations

import time
from dataclasses import dataclass

from agent_sessions.ratelimit import RateLimit


@dataclass(frozen=True)
class Clocked(RateLimit):
    """A rate limit on a clock that stands."""

    time: float = 1_000_000_020.0

    def now(self) -> float:
        return self.time


def early_in_the_minute(seconds: int = 5) -> None:
    """Wait for the next minute where this one has only so many seconds left."""
    left = RateLimit("", 1).wait()
    if left <= seconds:
        time.sleep(left)
