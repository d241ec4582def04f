"""The keys of an encrypting backend: what opens and what writes each session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from asgiref.sync import sync_to_async

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted.keys import KeySource, Permit, Permits
from agent_sessions.backends.encrypted.rotation import confirm
from agent_sessions.backends.encrypted.secrets import KnownSecrets, SessionSecrets
from agent_sessions.backends.options import EXAMPLES, parse_age
from agent_sessions.backends.wrapping import WrappingBackend
from agent_sessions.encryption import (
    KeyRing,
    Memory,
    Vault,
    carrier_for,
    session_context,
)
from agent_sessions.encryption.envelopes import AS_IS
from agent_sessions.encryption.keys import SECRETS, require_cryptography
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    UnknownEncryptionKey,
)

T = TypeVar("T")

DEFAULTS: dict[str, Any] = {
    "lifetime": None,
    "session_keys": False,
    "clear_without_key": False,
    "accept_sdk_envelopes": False,
    "name": None,
    "cache_bytes": 8 * 2**20,
    "key_refresh": 20,
}

# A rotation waits for twice as long.
_LONGEST_REFRESH = 3600


@dataclass(frozen=True, slots=True)
class Options:
    """How an alias encrypts; EncryptedBackend says what each option means."""

    # Seconds for which a turn is shown; None for ever.
    lifetime: float | None
    session_keys: bool
    clear_without_key: bool
    accept_sdk_envelopes: bool
    name: str
    cache_bytes: int
    # Seconds for which a process may write without asking for its keys again.
    key_refresh: float


def read_options(alias: str, options: Mapping[str, Any]) -> Options:
    """Read the options but for the keys. Raises InvalidBackend."""
    found = {name: options[name] for name in DEFAULTS}
    name, size, refresh = found["name"], found["cache_bytes"], found["key_refresh"]
    for flag in ("session_keys", "clear_without_key", "accept_sdk_envelopes"):
        if not isinstance(found[flag], bool):
            raise _invalid(alias, flag, "True or False")
    if name is not None and (not isinstance(name, str) or not name):
        raise _invalid(alias, "name", "a str, such as the alias had before")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise _invalid(alias, "cache_bytes", "a whole number of 0 or more")
    if isinstance(refresh, bool) or not isinstance(refresh, int | float):
        raise _invalid(alias, "key_refresh", "seconds")
    if not 1 <= refresh <= _LONGEST_REFRESH:
        raise _invalid(alias, "key_refresh", f"1 to {_LONGEST_REFRESH} seconds")
    found["name"] = alias if name is None else name
    try:
        if found["lifetime"] is not None:
            found["lifetime"] = parse_age(found["lifetime"]).total_seconds()
    except ValueError:
        raise _invalid(alias, "lifetime", f"a timedelta, or {EXAMPLES}") from None
    return Options(**found)


def _invalid(alias: str, option: str, wanted: str) -> InvalidBackend:
    return InvalidBackend(
        f"AGENT_SESSIONS[{alias!r}]: the option {option} can't be used.",
        hint=f"Give {wanted}.",
        id="agent_sessions.E019",
    )


class KeyedBackend(WrappingBackend):
    """Know the keys of each session of an alias, in its vaults."""

    required_options = frozenset({"backend", "keys"})
    option_defaults: ClassVar[dict[str, Any]] = DEFAULTS
    inner_option = "backend"
    encrypts = True

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        require_cryptography(type(self).__name__)
        self.settings = read_options(alias, self.options)
        self.source = KeySource(alias, self.options["keys"], self.settings.key_refresh)
        self._memory = Memory(self.settings.cache_bytes)
        # By database: a router may have one for each tenant.
        self._permits: dict[str, Permits] = {}
        # The sessions' keys lie in a database: async callers need a thread.
        self._is_threaded = self.settings.session_keys

    @property
    def permits(self) -> Permits:
        """Who may write with which key, by the rows of the directory's database."""
        using = self.directory.using
        found = self._permits.get(using)
        if found is None:
            found = self._permits[using] = Permits(self.alias, using, self.source)
        return found

    @property
    def secrets(self) -> SessionSecrets:
        """The sessions' own keys, where they have any."""
        return SessionSecrets(self.alias, self.directory.using)

    def writer(
        self, key: SessionKey, purpose: bytes = b"", permit: Permit | None = None
    ) -> Vault:
        """Return what opens a session's items, and writes them while a permit lasts.

        Raises UnknownEncryptionKey, and what Permits.take() does.
        """
        return self._reader(key, purpose, permit or self.permits.take())

    async def avault(self, key: SessionKey) -> Vault:
        """See writer()."""
        if self._is_threaded:
            return await self.threads.run(self.writer, key)
        return self._vault(key, permit=await self.permits.atake(self.threads))

    @contextmanager
    def writing(self, key: SessionKey, purpose: bytes = b"") -> Iterator[Vault]:
        """Encrypt and store in the block, under a key that nobody retires meanwhile."""
        permit = self.permits.take()
        if not self.settings.session_keys:
            yield self._vault(key, purpose=purpose, permit=permit)
        else:
            sealing = self._vault(key, purpose=SECRETS, permit=permit)
            with self.secrets.held(key, sealing) as secret:
                yield self._vault(key, permit.ring.under(secret), purpose)
        confirm(self, key, permit)

    def rewrap(self, key: SessionKey, permit: Permit | None = None) -> bool:
        """Put a session's own key under the first one; tell whether that was due.

        One that has none, being older than `session_keys`, gets one.
        """
        permit = permit or self.permits.take()
        vault = self._vault(key, purpose=SECRETS, permit=permit)
        if self.settings.session_keys and self.secrets.ensure(key, vault):
            return True
        # Those of the time when `session_keys` was on are there too.
        return self.secrets.rewrap(key, vault)

    def with_keys(
        self,
        key: SessionKey,
        use: Callable[[Vault], T],
        purpose: bytes = b"",
        known: KnownSecrets | None = None,
    ) -> T:
        """Use a session's keys, again where the provider has others by now.

        `known` are secrets that were read before.
        """
        try:
            return use(self._reader(key, purpose, known=known))
        except UnknownEncryptionKey:
            if not self.source.renew():
                raise
            return use(self._reader(key, purpose, known=known))

    async def awith_keys(
        self, key: SessionKey, use: Callable[[Vault], Awaitable[T]]
    ) -> T:
        await self.source.load()
        try:
            return await use(self._vault(key))
        except UnknownEncryptionKey:
            if not await sync_to_async(self.source.renew)():
                raise
            return await use(self._vault(key))

    def _reader(
        self,
        key: SessionKey,
        purpose: bytes = b"",
        permit: Permit | None = None,
        known: KnownSecrets | None = None,
    ) -> Vault:
        if self.settings.session_keys:
            masters = self._vault(key, purpose=SECRETS, permit=permit)
            secret = self.secrets.find(key, masters, known)
            if secret is not None:
                # What is under the session's own key needs no permit.
                return self._vault(key, masters.ring.under(secret), purpose)
        return self._vault(key, purpose=purpose, permit=permit)

    def _page_vault(self, key: SessionKey) -> Vault:
        """Return what opens a page, of which what doesn't open is shown as closed."""
        try:
            return self._reader(key)
        except EncryptionError:
            # The session's own key doesn't open.
            return self._vault(key)

    def _vault(
        self,
        key: SessionKey,
        ring: KeyRing | None = None,
        purpose: bytes = b"",
        permit: Permit | None = None,
    ) -> Vault:
        if ring is None:
            ring = self.source.ring() if permit is None else permit.ring
        vault = Vault(
            ring,
            self._context(key) + purpose,
            key.session_id,
            lifetime=self.settings.lifetime,
            # A session's own key is read from its row each time.
            memory=None if purpose else self._memory,
            # What lies beside items is a text of ours.
            carrier=AS_IS if purpose else carrier_for(self.inner),
            assert_writable=None if permit is None else permit.assert_valid,
        )
        # The SDK seals items only: what is bound to the id alone is no text or key.
        vault.accepts_sdk_envelopes = not purpose and self.settings.accept_sdk_envelopes
        return vault

    def _context(self, key: SessionKey) -> bytes:
        owner = None if key.user_id is None else str(key.user_id)
        return session_context(self.settings.name, owner, key.session_id)

    def _forget(self, key: SessionKey) -> None:
        self._memory.forget(self._context(key))
