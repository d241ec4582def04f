"""The right of a process to write with a master key, for some seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent_sessions.exceptions import EncryptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_sessions.encryption.keys import KeyRing

# A machine that was asleep has not stopped the time of the others.
clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to write with the first key of a ring.

    Times are clock()'s. From `due` on it is to be renewed; `until` then is the last
    moment in which anything may be encrypted; what was encrypted is stored by `over`,
    or came too late.
    """

    ring: KeyRing
    due: float
    until: float
    over: float

    @classmethod
    def since(cls, began: float, ring: KeyRing, seconds: float) -> Permit:
        """Make one of so many seconds, which is asked for since `began`."""
        return cls(ring, began + seconds / 2, began + seconds, began + 2 * seconds)

    @property
    def key_id(self) -> str:
        """The id of the key that may be written with."""
        return self.ring.first.id

    @property
    def is_due(self) -> bool:
        """Return whether it is to be renewed."""
        return clock() >= self.due

    @property
    def is_valid(self) -> bool:
        """Return whether something may be encrypted now."""
        return clock() < self.until

    @property
    def is_over(self) -> bool:
        """Return whether what is stored only now came too late."""
        return clock() >= self.over

    def assert_valid(self) -> None:
        """Pass where something may be encrypted now. Raises EncryptionError."""
        if not self.is_valid:
            raise EncryptionError(
                f"The process was held up for so long that it may not write with key "
                f"{self.key_id} any more. Nothing was written; try again."
            )
