"""What is kept of an answer that takes time, and fetched again while it still serves."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from agent_sessions.concurrency.forks import new_lock
from agent_sessions.exceptions import EncryptionError, StorageError
from agent_sessions.reports import guard_methods

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# Seconds until what has failed is tried again, while what was there still serves.
_RETRY = 5.0

# A machine that was asleep has not stopped the time of the others.
clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)


class Refreshed(ABC, Generic[T]):
    """A value that its users fetch again when it is half of `lasts` seconds old.

    One thread fetches it. The others go on with the value that is there, or wait for
    the new one if that is older than `lasts` or doesn't serve any more.
    """

    def __init__(self, lasts: float) -> None:
        self.value: T | None = None
        self._lasts = lasts
        self._lock = new_lock()
        # In clock()'s time: when the value was asked for, and when it is to be again.
        self._began = 0.0
        self._due = 0.0
        self._failure = ""

    @abstractmethod
    def _ask(self) -> T:
        """Fetch a value. Raises StorageError."""

    def _serves(self, value: T) -> bool:
        return True

    @property
    def is_old(self) -> bool:
        """Return whether there is no value that is younger than `lasts`."""
        return self.value is None or clock() - self._began > self._lasts

    def held(self) -> T | None:
        value = self.value
        return value if value is not None and self._serves(value) else None

    def peek(self) -> T | None:
        """Return the value; None if get() must fetch it."""
        if clock() < self._due or (self._lock.locked() and not self.is_old):
            return self.held()
        return None

    def get(self) -> T:
        """Return the value, which outlasts failures for as long as it serves.

        Raises StorageError.
        """
        return self.peek() or self._refresh()

    def young(self) -> T:
        """Return the value, if it is not old. Raises EncryptionError."""
        value = self.get()
        if self.is_old:
            raise EncryptionError(self._failure)
        return value

    def fetch(self) -> T:
        began = clock()
        return self.put(self._ask(), began)

    def put(self, value: T, began: float) -> T:
        """Keep a value that was asked for at a moment."""
        self.value = value
        self._began, self._due = began, began + self._lasts / 2
        return value

    def _refresh(self) -> T:
        waits = self.is_old or self.held() is None
        locked = self._lock.acquire(timeout=self._lasts if waits else 0)
        try:
            held = self.held()
            if held is not None and (clock() < self._due or not (locked or waits)):
                return held
            return self.fetch()
        except StorageError as exc:
            if (held := self.held()) is None:
                raise
            self._failure, self._due = str(exc), clock() + _RETRY
            logger.warning("%s What was there before still serves.", exc)
            return held
        finally:
            if locked:
                self._lock.release()


guard_methods(Refreshed, ["get", "young", "fetch"])
