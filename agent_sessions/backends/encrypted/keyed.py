"""The keys of an encrypting backend: what opens and what writes each session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from asgiref.sync import sync_to_async

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted.options import DEFAULTS, read_options
from agent_sessions.backends.encrypted.source import KeySource
from agent_sessions.backends.wrapping import WrappingBackend
from agent_sessions.encryption import (
    KeyRing,
    Memory,
    Vault,
    carrier_for,
    session_context,
)
from agent_sessions.encryption.carriers import AS_IS
from agent_sessions.encryption.keys import SECRETS, require_cryptography
from agent_sessions.exceptions import EncryptionError, UnknownEncryptionKey

if TYPE_CHECKING:
    from agent_sessions.backends.encrypted.permits import Permits
    from agent_sessions.backends.encrypted.secrets import KnownSecrets, SessionSecrets
    from agent_sessions.encryption.permit import Permit

T = TypeVar("T")


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

    def vault(self, key: SessionKey, purpose: bytes = b"") -> Vault:
        """Return what opens a session's items, also those under its own key.

        Raises UnknownEncryptionKey and EncryptionError.
        """
        return self._reader(key, purpose)

    async def avault(self, key: SessionKey) -> Vault:
        """See writer()."""
        if self._is_threaded:
            return await self.threads.run(self.writer, key)
        permit = await self.permits.atake(self.threads)
        return self._vault(key, permit=permit)

    def writer(
        self, key: SessionKey, purpose: bytes = b"", permit: Permit | None = None
    ) -> Vault:
        """Return what opens a session's items, and writes them while a permit lasts.

        Raises UnknownEncryptionKey, and what Permits.take() does.
        """
        return self._reader(key, purpose, permit or self.permits.take())

    @property
    def permits(self) -> Permits:
        """Who may write with which key, by the rows of the directory's database."""
        using = self.directory.using
        found = self._permits.get(using)
        if found is None:
            from agent_sessions.backends.encrypted.permits import Permits

            found = self._permits[using] = Permits(self.alias, using, self.source)
        return found

    def _confirm(self, key: SessionKey, permit: Permit) -> None:
        """Look after what was stored when the permit was over, or will be later."""
        from agent_sessions.backends.encrypted.rotation import confirm

        confirm(self, key, permit)

    def rewrap(self, key: SessionKey, permit: Permit | None = None) -> bool:
        """Put a session's own key under the first one; tell whether that was due.

        One that has none, being older than `session_keys`, gets one.
        """
        from agent_sessions.backends.encrypted.secrets import SessionSecrets

        permit = permit or self.permits.take()
        vault = self._vault(key, purpose=SECRETS, permit=permit)
        secrets = SessionSecrets(self.alias, self.permits.using)
        if self.settings.session_keys and secrets.ensure(key, vault):
            return True
        # Those of the time when `session_keys` was on are there too.
        return secrets.rewrap(key, vault)

    @cached_property
    def secrets(self) -> SessionSecrets | None:
        """The sessions' own keys, where they have any."""
        from agent_sessions.backends.encrypted.secrets import SessionSecrets

        if not self.settings.session_keys:
            return None
        return SessionSecrets(self.alias, self.directory.using)

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
            permit=permit,
        )
        # The SDK seals items only: what is bound to the id alone is no text or key.
        vault.accepts_sdk_envelopes = not purpose and self.settings.accept_sdk_envelopes
        return vault

    def _context(self, key: SessionKey) -> bytes:
        owner = None if key.user_id is None else str(key.user_id)
        return session_context(self.settings.name, owner, key.session_id)

    def _reader(
        self,
        key: SessionKey,
        purpose: bytes = b"",
        permit: Permit | None = None,
        known: KnownSecrets | None = None,
    ) -> Vault:
        secrets = known or self.secrets
        if secrets is None:
            return self._vault(key, purpose=purpose, permit=permit)
        masters = self._vault(key, purpose=SECRETS, permit=permit)
        secret = secrets.find(key, masters)
        if secret is None:
            return self._vault(key, purpose=purpose, permit=permit)
        # What is under the session's own key needs no permit.
        return self._vault(key, masters.ring.under(secret), purpose)

    def _forget(self, key: SessionKey) -> None:
        self._memory.forget(self._context(key))

    def _page_vault(self, key: SessionKey) -> Vault:
        """Return what opens a page, of which what doesn't open is shown as closed."""
        try:
            return self._reader(key)
        except EncryptionError:
            # The session's own key doesn't open.
            return self._vault(key)

    @contextmanager
    def writing(self, key: SessionKey, purpose: bytes = b"") -> Iterator[Vault]:
        """Encrypt and store in the block, under a key that nobody retires meanwhile."""
        permit = self.permits.take()
        if self.secrets is None:
            yield self._vault(key, purpose=purpose, permit=permit)
        else:
            sealing = self._vault(key, purpose=SECRETS, permit=permit)
            with self.secrets.held(key, sealing) as secret:
                yield self._vault(key, permit.ring.under(secret), purpose)
        self._confirm(key, permit)

    def with_keys(
        self,
        key: SessionKey,
        use: Callable[[Vault], T],
        purpose: bytes = b"",
        known: KnownSecrets | None = None,
    ) -> T:
        """Use a session's keys, again where the provider has others by now."""
        try:
            return use(self._reader(key, purpose, known=known))
        except UnknownEncryptionKey:
            if not self.source.renew():
                raise
            return use(self._reader(key, purpose, known=known))

    async def _awith_keys(
        self, key: SessionKey, use: Callable[[Vault], Awaitable[T]]
    ) -> T:
        await self.source.load()
        try:
            return await use(self._vault(key))
        except UnknownEncryptionKey:
            if not await sync_to_async(self.source.renew)():
                raise
            return await use(self._vault(key))
