"""How often something may be asked for in this process: token buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

MINUTE = 60


class Rates:
    """Count what is asked for: so much at once, and as much again every minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # For each key, what was left when it was last asked for, and when that was.
        self._buckets: dict[Hashable, tuple[float, float]] = {}
        self._swept = clock()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, per_minute: int) -> bool:
        """Take one of a key's share; return False where it is used up."""
        now = self._clock()
        self._sweep(now)
        left, since = self._buckets.get(key, (per_minute, now))
        left = min(per_minute, left + (now - since) * per_minute / MINUTE)
        taken = left >= 1
        self._buckets[key] = (left - taken, now)
        return taken

    def _sweep(self, now: float) -> None:
        """Forget the keys whose share is whole again, so that memory stays bounded."""
        if now - self._swept < MINUTE:
            return
        self._swept = now
        self._buckets = {
            key: bucket
            for key, bucket in self._buckets.items()
            if now - bucket[1] < MINUTE
        }
