"""Who may write with which master key: rows that a rotation can rely on.

A process may encrypt under a key for `seconds` after it has counted its key's row up,
which it does again before half of them are over, with the keys asked for anew. Other
`seconds` are for what is on its way to the store. So a key whose row was not counted up
for twice as long is written with by nobody, whatever the clocks of the hosts say; who
then marks the row as retired, by compare-and-set, knows that nobody will be.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.db.models import F, Value
from django.db.models.functions import Greatest
from django.utils import timezone

from agent_sessions.backends.encrypted.source import RETRY, KeySource, clock
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.exceptions import (
    EncryptionError,
    RetiredEncryptionKey,
    StorageError,
)
from agent_sessions.models import KeyUse
from agent_sessions.reports import as_storage_error

if TYPE_CHECKING:
    from agent_sessions.concurrency.threads import DatabaseThreads
    from agent_sessions.encryption import KeyRing

logger = logging.getLogger("agent_sessions.backends")


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


class Permits:
    """The permits of this process for one alias."""

    def __init__(self, alias: str, using: str, source: KeySource) -> None:
        self.alias = alias
        self.using = using
        self._source = source
        self._permit: Permit | None = None
        self._lock = new_lock()

    def rows(self) -> Any:
        """Return the rows of the alias's keys, as a query set."""
        return KeyUse.objects.using(self.using).filter(backend=self.alias)

    def asking(self) -> AbstractContextManager[None]:
        """Ask the database for rows in the block. Raises StorageError where it fails."""
        return as_storage_error(
            self.using, "read or write which encryption keys are in use"
        )

    def is_retired(self, key_id: str) -> bool:
        """Return whether nobody may write with a key any more."""
        with self.asking():
            rows = self.rows().filter(key_id=key_id)
            return bool(rows.exclude(retired_at=None).exists())

    def peek(self) -> Permit | None:
        """Return the permit that is there; None where take() must ask the database."""
        permit = self._held()
        if permit is not None and permit.is_due and not self._lock.locked():
            return None
        return permit

    def take(self) -> Permit:
        """Return a permit to write with the newest key.

        Raises RetiredEncryptionKey, EncryptionError where the provider of keys fails,
        and StorageError where the database does. While it lasts, the former permit
        bridges such failures.
        """
        return self.peek() or self._renew()

    async def atake(self, threads: DatabaseThreads) -> Permit:
        """See take(). Neither the provider nor the database holds up the loop."""
        permit = self.peek()
        if permit is None:
            await self._source.load()
            permit = await threads.run(self.take)
        return permit

    def _held(self) -> Permit | None:
        permit = self._permit
        if permit is None or not self._source.is_ring(permit.ring):
            return None
        return permit if permit.is_valid else None

    def _renew(self) -> Permit:
        held = self._held()
        connection = connections[self.using]
        if connection.vendor == "sqlite" and connection.in_atomic_block:
            # The only writer there is: nobody else gets between this and the commit.
            return held or self._take_within()
        # One asks, and the others go on meanwhile or wait for it.
        locked = self._lock.acquire(timeout=0 if held else self._source.seconds)
        try:
            again = self._held()
            if again is not None and (not locked or not again.is_due):
                return again
            self._permit = self._take()
            return self._permit
        except RetiredEncryptionKey:
            self._permit = None
            raise
        except StorageError as exc:
            if held is None or not held.is_valid:
                raise
            logger.warning("The keys of %r could not be renewed: %s", self.alias, exc)
            self._permit = replace(held, due=clock() + RETRY)
            return self._permit
        finally:
            if locked:
                self._lock.release()

    def _take(self) -> Permit:
        ring = self._source.newest()
        began = clock()
        with self.asking():
            self._outside(partial(self._count_up, ring.first.id))
        return Permit.since(began, ring, self._source.seconds)

    def _take_within(self) -> Permit:
        """Take a permit in the caller's transaction, which may be rolled back."""
        ring = self._source.newest()
        permit = Permit.since(clock(), ring, self._source.seconds)
        with self.asking():
            self._count_up(permit.key_id)

        def keep() -> None:
            self._permit = permit

        transaction.on_commit(keep, using=self.using)
        return permit

    def _outside(self, call: Callable[[], None]) -> None:
        """Call something outside of the caller's transaction, so that all see it.

        What is not committed yet is seen by nobody, and may hold up everybody.
        """
        connection = connections[self.using]
        if connection.vendor == "sqlite" or connection.get_autocommit():
            call()
            return

        def alone() -> None:
            try:
                call()
            finally:
                connections[self.using].close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(alone).result()

    def _count_up(self, key_id: str) -> None:
        rows = self.rows().filter(key_id=key_id)
        if self._update(rows):
            return
        rows.get_or_create(
            backend=self.alias,
            key_id=key_id,
            defaults={"seconds": self._source.seconds},
        )
        if not self._update(rows):
            raise RetiredEncryptionKey(self.alias, key_id)

    def _update(self, rows: Any) -> int:
        changed: int = rows.filter(retired_at=None).update(
            takings=F("takings") + 1,
            seconds=Greatest(F("seconds"), Value(float(self._source.seconds))),
            holder=f"{socket.gethostname()}:{os.getpid()}"[:255],
            taken_at=timezone.now(),
        )
        return changed
