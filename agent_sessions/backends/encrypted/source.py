"""Where an alias's keys come from: its settings, or a function that fetches them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core import checks
from django.utils.module_loading import import_string

from agent_sessions.concurrency.forks import new_lock
from agent_sessions.encryption import KeyRing
from agent_sessions.encryption.keys import GENERATE
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    InvalidEncryptionKey,
)
from agent_sessions.reports import guard_methods, place_of

logger = logging.getLogger("agent_sessions.backends")

# Seconds between two questions to a provider for keys that nobody knows.
_PATIENCE = 30.0
# Seconds until what has failed is tried again, while what was there still serves.
RETRY = 5.0


# A machine that was asleep has not stopped the time of the others.
clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)


class KeySource:
    """The keys of one alias.

    A list is read at once. What a function gives is fetched on first use, and fetched
    again by who uses it after half of `seconds`, or where an item names a key that isn't
    there. Raises InvalidBackend.
    """

    def __init__(self, alias: str, keys: Any, seconds: float) -> None:
        self.seconds = seconds
        self._setting = f"AGENT_SESSIONS[{alias!r}]"
        self._ring: KeyRing | None = None
        self._provider: Callable[[], Any] | None = None
        self._lock = new_lock()
        self._asked = 0.0
        # In clock()'s time: when the ring was asked for, and when it is to be again.
        self._read = 0.0
        self._due = 0.0
        self._failure = ""
        if isinstance(keys, str) and "." in keys:
            self._provider = self._import(keys)
        elif callable(keys):
            self._provider = keys
        else:
            self._ring = self._parse(keys)

    def __repr__(self) -> str:
        return f"<KeySource of {self._setting}>"

    @property
    def is_ready(self) -> bool:
        """Return whether ring() answers without asking the provider."""
        if self._provider is None:
            return True
        return clock() < self._due or (self._lock.locked() and not self._is_old)

    @property
    def _is_old(self) -> bool:
        """Return whether there are no keys yet that may be written with."""
        return self._ring is None or clock() - self._read > self.seconds

    def is_ring(self, ring: KeyRing) -> bool:
        """Return whether these are the keys that were fetched last."""
        return ring is self._ring

    def ring(self) -> KeyRing:
        """Return the keys to read with.

        Raises EncryptionError where the provider fails at first; later what it gave
        before is kept.
        """
        if self._ring is None or not self.is_ready:
            self._refresh()
        if self._ring is None:
            raise EncryptionError(self._failure)
        return self._ring

    async def load(self) -> None:
        """Have ring() answer without asking: a provider may take time, a loop has none."""
        if not self.is_ready:
            await sync_to_async(self.ring)()

    def newest(self) -> KeyRing:
        """Return keys to write with, at most `seconds` old. Raises EncryptionError."""
        ring = self.ring()
        if self._provider is not None and self._is_old:
            raise EncryptionError(self._failure)
        return ring

    def ask(self) -> KeyRing:
        """Ask the provider for the keys now. Raises EncryptionError."""
        return self._ring if self._ring and not self._provider else self._ask()

    def renew(self) -> bool:
        """Ask the provider for keys again; tell whether there are others now.

        At most every half minute: an item may name any key.
        """
        if self._provider is None or time.monotonic() - self._asked < _PATIENCE:
            return False
        before = self._ring
        return self._ask() is not before

    def check(self) -> list[checks.CheckMessage]:
        """Warn of keys that can be guessed. A provider isn't asked."""
        if self._provider is not None:
            return []
        messages: list[checks.CheckMessage] = []
        secrets = {settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS}
        known = {str(secret).encode() for secret in secrets}
        for number, key in enumerate(self.ring(), 1):
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

    def _refresh(self) -> None:
        """Ask the provider; who has keys already goes on while another one asks."""
        waits = self._is_old
        locked = self._lock.acquire(timeout=self.seconds if waits else 0)
        try:
            if self._ring is not None and clock() < self._due:
                return
            if locked or waits:
                self._ask()
        except EncryptionError as exc:
            self._failure = str(exc)
            if self._ring is None:
                raise
            self._due = clock() + RETRY
            logger.warning("%s The former keys still read.", exc)
        finally:
            if locked:
                self._lock.release()

    def _ask(self) -> KeyRing:
        assert self._provider is not None  # noqa: S101 - else there is a ring
        self._asked, began = time.monotonic(), clock()
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
        if self._ring is None or self._ring.ids != ring.ids:
            self._ring = ring
        self._read, self._due = began, began + self.seconds / 2
        return self._ring

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


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


guard_methods(KeySource, ["__init__", "ring", "newest", "ask", "renew", "check"])
