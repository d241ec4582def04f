"""Limits on how often users do something, counted in a cache or in this process."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from django.contrib.auth import get_user_model
from django.core.cache import BaseCache, caches
from django.db import router

logger = logging.getLogger("agent_sessions.ratelimit")

# Seconds between two warnings about one cache.
WARN_EVERY = 60
MINUTE = 60
# Pauses, in seconds, before a cache that neither adds a key nor has it is asked again.
_PAUSES = (0.005, 0.01, 0.02, 0.04)
_warned: dict[str, float] = {}


class _NotKept(Exception):
    """A cache neither adds a key nor has it."""


@dataclass(frozen=True)
class RateLimit:
    """Limit what each user does to `limit` times in each window of `seconds`.

    Windows follow the clock: those of 60 seconds begin with the minute. Each event
    takes one of the window's keys with `cache.add()`, which memory, Redis, Memcached
    and database caches all do atomically, unlike `incr()`. The window's number is in
    its keys, so no key is used twice and nothing depends on when it expires.

    Where the cache fails, everything is allowed, and a warning is logged once a minute.
    """

    name: str
    limit: int
    seconds: float = 60
    cache: str = "default"

    def take(self, user_pk: Any) -> bool:
        """Count an event of a user, and return False if the window is full."""
        # A wrong alias is a mistake in the code, not a cache that fails.
        cache = caches[self.cache]
        try:
            return self._take(cache, self._prefix(user_pk))
        except Exception as exc:  # Each cache has errors of its own.
            self._warn(type(exc).__name__)
            return True

    def wait(self) -> int:
        """Return the whole seconds until the next window begins."""
        return math.ceil(self.seconds - self.now() % self.seconds)

    def now(self) -> float:
        """Return the time, in seconds since the epoch."""
        return time.time()

    def _take(self, cache: BaseCache, prefix: str) -> bool:
        # Long enough for hosts whose clocks differ.
        timeout = math.ceil(2 * self.seconds) + 1
        hint = f"{prefix}:taken"
        # How many are taken at least: it saves asking for each. Late writers may set
        # it back, which costs a few questions and nothing else.
        taken = cache.get(hint, 0)
        for number in range(taken, self.limit):
            if _claim(cache, f"{prefix}:{number}", timeout):
                cache.set(hint, number + 1, timeout)
                return True
        if taken < self.limit:
            cache.set(hint, self.limit, timeout)
        return False

    def _prefix(self, user_pk: Any) -> str:
        # A hash, since a primary key may be a text that no cache takes as a key.
        # Two databases may have users of the same primary key.
        using = router.db_for_write(get_user_model())
        counted = f"{self.name} {self.seconds} {using} {user_pk}"
        digest = hashlib.blake2b(
            counted.encode("utf-8", "backslashreplace"), digest_size=16
        ).hexdigest()
        return f"agent_sessions:rate:{digest}:{self.now() // self.seconds:.0f}"

    def _warn(self, reason: str) -> None:
        now = time.monotonic()
        if now - _warned.get(self.cache, -math.inf) < WARN_EVERY:
            return
        _warned[self.cache] = now
        logger.warning(
            "The cache %r can't count %s (%s), so they are not limited. Repair the "
            "cache, or choose another for rate limits.",
            self.cache,
            self.name,
            reason,
        )


def _claim(cache: BaseCache, key: str, timeout: int) -> bool:
    """Add a key, and return whether it was new. Raises _NotKept.

    add() is False as well where a cache hides its errors: Django's database cache when
    the database is locked, django-redis with IGNORE_EXCEPTIONS.
    """
    for pause in (0, *_PAUSES):
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        if cache.add(key, 1, timeout):
            return True
        if cache.get(key) is not None:
            return False
    raise _NotKept


class Rates:
    """Count events in this process, in a token bucket for each key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # For each key, what was left when it was last asked for, and when that was.
        self._buckets: dict[Hashable, tuple[float, float]] = {}
        self._swept = clock()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, per_minute: int) -> bool:
        """Count one event of a key, and return False if its share is used up."""
        now = self._clock()
        self._sweep(now)
        left, since = self._buckets.get(key, (per_minute, now))
        left = min(per_minute, left + (now - since) * per_minute / MINUTE)
        taken = left >= 1
        self._buckets[key] = (left - taken, now)
        return taken

    def _sweep(self, now: float) -> None:
        """Remove the keys whose share is whole again, so that memory stays bounded."""
        if now - self._swept < MINUTE:
            return
        self._swept = now
        self._buckets = {
            key: bucket
            for key, bucket in self._buckets.items()
            if now - bucket[1] < MINUTE
        }
