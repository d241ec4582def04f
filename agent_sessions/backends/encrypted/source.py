"""Where an alias's keys come from: its settings, or a function that fetches them."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from django.conf import settings
from django.core import checks
from django.utils.module_loading import import_string

from agent_sessions.encryption import KeyRing
from agent_sessions.encryption.keys import GENERATE
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    InvalidEncryptionKey,
)
from agent_sessions.reports import guard_methods, place_of

# Seconds between two questions to a provider for keys that nobody knows.
_PATIENCE = 30.0


class KeySource:
    """The keys of one alias.

    A list is read at once. What a function gives is fetched on first use and kept, and
    fetched again where an item names a key that isn't there. Raises InvalidBackend.
    """

    def __init__(self, alias: str, keys: Any) -> None:
        self._setting = f"AGENT_SESSIONS[{alias!r}]"
        self._ring: KeyRing | None = None
        self._provider: Callable[[], Any] | None = None
        self._asked = 0.0
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
        """Tell whether ring() answers without asking the provider."""
        return self._ring is not None

    def ring(self) -> KeyRing:
        """Give the keys. Raises EncryptionError where the provider fails."""
        if self._ring is None:
            self._ring = self._ask()
        return self._ring

    def renew(self) -> bool:
        """Ask the provider for keys again; tell whether there are others now.

        At most every half minute: an item may name any key.
        """
        if self._provider is None or time.monotonic() - self._asked < _PATIENCE:
            return False
        before = self.ring().ids
        self._ring = self._ask()
        return self._ring.ids != before

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

    def _ask(self) -> KeyRing:
        assert self._provider is not None  # noqa: S101 - else there is a ring
        self._asked = time.monotonic()
        try:
            return KeyRing.parse(self._provider())
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


guard_methods(KeySource, ["__init__", "ring", "renew", "check"])
