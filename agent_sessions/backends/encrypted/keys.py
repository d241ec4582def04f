"""The master keys of an alias: where they come from, and who may write with them.

A process may encrypt under a key for `seconds` after it has counted its key's row up,
which it does again before half of them are over, with the keys asked for anew. Other
`seconds` are for what is on its way to the store. So a key whose row was not counted up
for twice as long is written with by nobody, whatever the clocks of the hosts say; who
then marks the row as retired, by compare-and-set, knows that nobody will be.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core import checks
from django.db import connections, transaction
from django.db.models import F, Value
from django.db.models.functions import Greatest
from django.utils import timezone
from django.utils.module_loading import import_string

from agent_sessions.backends.encrypted.refreshed import Refreshed, clock
from agent_sessions.encryption import KeyRing
from agent_sessions.encryption.keys import GENERATE
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    InvalidEncryptionKey,
    RetiredEncryptionKey,
)
from agent_sessions.models import KeyUse
from agent_sessions.reports import as_storage_error, guard_methods, place_of

if TYPE_CHECKING:
    from agent_sessions.concurrency.threads import DatabaseThreads

# Seconds between two questions to a provider for keys that nobody knows.
_PATIENCE = 30.0


class KeySource(Refreshed[KeyRing]):
    """The keys of one alias.

    A list is read at once. What a function returns is fetched on first use, and again
    by who uses it after half of `seconds`, or if an item names a key that isn't there.
    get() returns the keys to read with, young() those to write with. Raises
    InvalidBackend.
    """

    def __init__(self, alias: str, keys: Any, seconds: float) -> None:
        self._setting = f"AGENT_SESSIONS[{alias!r}]"
        self._provider: Callable[[], Any] | None = None
        self._asked = 0.0
        if isinstance(keys, str) and "." in keys:
            self._provider = self._import(keys)
        elif callable(keys):
            self._provider = keys
        # Keys that stand in the settings don't change.
        super().__init__(math.inf if self._provider is None else seconds)
        if self._provider is None:
            self.put(self._parse(keys), clock())

    def __repr__(self) -> str:
        return f"<KeySource of {self._setting}>"

    async def load(self) -> None:
        """Fetch the keys in a thread, so that get() doesn't block the loop."""
        if self.peek() is None:
            await sync_to_async(self.get)()

    def renew(self) -> bool:
        """Ask the provider for keys again; return whether there are others now.

        At most every half minute: an item may name any key.
        """
        if self._provider is None or time.monotonic() - self._asked < _PATIENCE:
            return False
        before = self.value
        return self.fetch() is not before

    def check(self) -> list[checks.CheckMessage]:
        """Warn of keys that can be guessed. A provider isn't asked."""
        if self._provider is not None:
            return []
        messages: list[checks.CheckMessage] = []
        secrets = {settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS}
        known = {str(secret).encode() for secret in secrets}
        for number, key in enumerate(self.get(), 1):
            if key.secret in known:
                reason = "is the project's SECRET_KEY, which other things depend on too"
            elif not key.is_strong:
                reason = "is a text, not 32 random bytes: it may be guessed"
            else:
                continue
            messages.append(
                checks.Warning(
                    f"{self._setting}: key {number} ({key.id}) {reason}.",
                    hint=f"Make a key with {GENERATE}, put it in front of the others, "
                    "and run manage.py rotate_agent_session_keys.",
                    id="agent_sessions.W011",
                )
            )
        return messages

    def _import(self, path: str) -> Callable[[], Any]:
        try:
            found = import_string(path)
        except ImportError as exc:
            # It may be a key with a dot in it, and no path.
            named = f" {path!r}: {exc}" if _is_module(path.partition(".")[0]) else ""
            raise self._invalid(f"can't import the provider of keys{named}.") from None
        if not callable(found):
            raise self._invalid(f"the provider of keys {path!r} is no function.")
        return found  # type: ignore[no-any-return]

    def _ask(self) -> KeyRing:
        if self._provider is None:
            return self.value  # type: ignore[return-value]
        self._asked = time.monotonic()
        try:
            ring = KeyRing.parse(self._provider())
        except InvalidEncryptionKey as exc:
            raise EncryptionError(
                f"{self._setting}: the provider of keys gave a bad one. {exc}"
            ) from None
        except Exception as exc:
            # Its own words may hold what nobody should see.
            raise EncryptionError(
                f"{self._setting}: the provider of keys failed "
                f"({place_of(exc)}). Nothing was changed."
            ) from None
        before = self.value
        return before if before is not None and before.ids == ring.ids else ring

    def _parse(self, keys: Any) -> KeyRing:
        try:
            return KeyRing.parse(keys)
        except InvalidEncryptionKey as exc:
            raise self._invalid(f"keys can't be used. {exc}") from None

    def _invalid(self, reason: str) -> InvalidBackend:
        return InvalidBackend(
            f"{self._setting}: {reason}",
            hint="Give a list of keys, the newest first, or the dotted path of a "
            f"function that returns one. Make a key with {GENERATE}",
            id="agent_sessions.E019",
        )


guard_methods(KeySource, ["__init__", "renew", "check"])


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to encrypt with the first key of a ring, for `seconds` from `began`.

    Times are clock()'s.
    """

    ring: KeyRing
    began: float
    seconds: float

    @property
    def key_id(self) -> str:
        return self.ring.first.id

    @property
    def is_valid(self) -> bool:
        return clock() < self.began + self.seconds

    def assert_valid(self) -> None:
        if not self.is_valid:
            raise EncryptionError(
                f"The process was held up for so long that it may not write with key "
                f"{self.key_id} any more. Nothing was written; try again."
            )


class Permits(Refreshed[Permit]):
    """The permits of this process for one alias, database and schema."""

    # Whether only the caller's own connection leads to the rows.
    stays_within = False

    def __init__(
        self, alias: str, using: str, source: KeySource, seconds: float
    ) -> None:
        super().__init__(seconds)
        self.alias = alias
        self.using = using
        self._source = source

    def rows(self) -> Any:
        return KeyUse.objects.using(self.using).filter(backend=self.alias)

    def asking(self) -> AbstractContextManager[None]:
        """Ask the database for rows in the block. Raises StorageError where it fails."""
        return as_storage_error(
            self.using, "read or write which encryption keys are in use"
        )

    def take(self) -> Permit:
        """Return a permit to write with the newest key.

        Raises RetiredEncryptionKey, EncryptionError where the provider of keys fails,
        and StorageError where the database does. While it lasts, the former permit
        bridges such failures.
        """
        if (permit := self.peek()) is not None:
            return permit
        connection = connections[self.using]
        is_alone = connection.vendor == "sqlite" or self.stays_within
        if is_alone and connection.in_atomic_block:
            # On SQLite nobody else writes before the commit; elsewhere who retires the
            # key waits for it.
            return self.held() or self._take_within()
        return self.get()

    async def atake(self, threads: DatabaseThreads) -> Permit:
        """See take(). Neither the provider nor the database holds up the loop."""
        permit = self.peek()
        if permit is None:
            await self._source.load()
            permit = await threads.run(self.take)
        return permit

    def _serves(self, permit: Permit) -> bool:
        return permit.is_valid and permit.ring is self._source.value

    def _ask(self) -> Permit:
        permit = Permit(self._source.young(), clock(), self._lasts)
        try:
            with self.asking():
                self._outside(partial(self._count_up, permit.key_id))
        except RetiredEncryptionKey:
            self.value = None
            raise
        return permit

    def _take_within(self) -> Permit:
        """Take a permit in the caller's transaction, which may be rolled back."""
        permit = Permit(self._source.young(), clock(), self._lasts)
        with self.asking():
            self._count_up(permit.key_id)
        transaction.on_commit(partial(self.put, permit, permit.began), using=self.using)
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
            backend=self.alias, key_id=key_id, defaults={"seconds": self._lasts}
        )
        if not self._update(rows):
            raise RetiredEncryptionKey(self.alias, key_id)

    def _update(self, rows: Any) -> int:
        changed: int = rows.filter(retired_at=None).update(
            takings=F("takings") + 1,
            seconds=Greatest(F("seconds"), Value(float(self._lasts))),
            holder=f"{socket.gethostname()}:{os.getpid()}"[:255],
            taken_at=timezone.now(),
        )
        return changed


def search_path(using: str) -> str | None:
    """Return the schemas that the running thread's connection to PostgreSQL reads."""
    connection = connections[using]
    if connection.vendor != "postgresql":
        return None
    with as_storage_error(using, "look up the schema"), connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('search_path')")
        return str(cursor.fetchone()[0])


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
