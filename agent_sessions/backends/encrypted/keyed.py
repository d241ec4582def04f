"""The keys of an encrypting backend: what opens and what writes each session."""

from __future__ import annotations

import base64
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.db.models import F

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.encrypted.keys import (
    KeySource,
    Permit,
    Permits,
    search_path,
)
from agent_sessions.backends.options import EXAMPLES, parse_age
from agent_sessions.backends.remote.erasure import owner_text
from agent_sessions.backends.wrapping import WrappingBackend
from agent_sessions.encryption import KeyRing, MasterKey, Memory, Vault, session_context
from agent_sessions.encryption.keys import SECRETS, require_cryptography
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    UnknownEncryptionKey,
)
from agent_sessions.models import AgentSession, SessionSecret
from agent_sessions.reports import as_storage_error

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """How an alias encrypts; EncryptedBackend says what each option means."""

    # Seconds for which a turn is shown; None for ever.
    lifetime: float | None = None
    session_keys: bool = False
    clear_without_key: bool = False
    accept_sdk_envelopes: bool = False
    name: str | None = None
    cache_bytes: int = 8 * 2**20
    # Seconds for which a process may write without asking for its keys again. A
    # rotation waits for twice as long.
    key_refresh: float = 20


DEFAULTS = asdict(Options())
_FLAG = (lambda value: isinstance(value, bool), "True or False")
# Whether an option's value can be used, and what is wanted.
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "session_keys": _FLAG,
    "clear_without_key": _FLAG,
    "accept_sdk_envelopes": _FLAG,
    "name": (
        lambda value: value is None or (isinstance(value, str) and bool(value)),
        "a str, such as the alias had before",
    ),
    "cache_bytes": (
        lambda value: type(value) is int and value >= 0,
        "a whole number of 0 or more",
    ),
    "key_refresh": (
        lambda value: type(value) in {int, float} and 1 <= value <= 3600,
        "1 to 3600 seconds",
    ),
}


def read_options(alias: str, options: Mapping[str, Any]) -> Options:
    """Read the options but for the keys. Raises InvalidBackend."""
    found = {name: options[name] for name in DEFAULTS}
    for name, (is_fine, wanted) in _WANTED.items():
        if not is_fine(found[name]):
            raise _invalid(alias, name, wanted)
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


# Secrets that were read before, by the session's id and owner.
KnownSecrets = Mapping[tuple[str, str], SessionSecret]


class SessionSecrets:
    """The secrets of one alias's sessions, in the directory's database."""

    def __init__(self, alias: str, using: str) -> None:
        self.alias = alias
        self.using = using

    def rows(self, key: SessionKey) -> Any:
        return SessionSecret.objects.using(self.using).filter(
            backend=self.alias, session_id=key.session_id, owner=owner_text(key.user_id)
        )

    def find(
        self, key: SessionKey, vault: Vault, known: KnownSecrets | None = None
    ) -> MasterKey | None:
        """Read a session's key; None where it has none, or none any more.

        `vault` is the session's under the master keys. Raises UnknownEncryptionKey.
        """
        if known is None:
            with self._told():
                row = self.rows(key).first()
        else:
            row = known.get((key.session_id, owner_text(key.user_id)))
        return None if row is None else _unwrap(row, vault)

    def read_all(self, keys: Sequence[SessionKey]) -> KnownSecrets:
        """Read the keys of many sessions in one query."""
        with self._told():
            rows = SessionSecret.objects.using(self.using).filter(
                backend=self.alias, session_id__in={key.session_id for key in keys}
            )
            return {(row.session_id, row.owner): row for row in rows}

    @contextmanager
    def held(self, key: SessionKey, vault: Vault) -> Iterator[MasterKey]:
        """Lock a session's key to the end of a transaction; make it if it has none.

        So nobody destroys it while something is written under it.
        """
        with self._told(), transaction.atomic(self.using):
            row = self._lock(key) or self._make(key, vault)
            yield _unwrap(row, vault)

    @contextmanager
    def destroyed(self, key: SessionKey) -> Iterator[None]:
        """Destroy a session's key together with what the block removes."""
        with self._told(), transaction.atomic(self.using):
            self._lock(key)
            yield
            self.rows(key).delete()

    def ensure(self, key: SessionKey, vault: Vault) -> bool:
        """Make the key of a session that has none; return whether that was due.

        A session that was deleted meanwhile gets none.
        """
        with self._told():
            if self.rows(key).exists():
                return False
        with self._told(), transaction.atomic(self.using):
            self._make(key, vault)
            sessions: Any = AgentSession.objects.using(self.using).filter(
                backend=self.alias, session_id=key.session_id, user_id=key.user_id
            )
            if sessions.select_for_update().exists():
                return True
            self.rows(key).delete()
        return False

    def rewrap(self, key: SessionKey, vault: Vault) -> bool:
        """Encrypt a session's key under the first master key, if that is due."""
        with self._told():
            row = self.rows(key).first()
            if row is None or row.key_id == vault.ring.first.id:
                return False
            wrapped = _wrap(_unwrap(row, vault).secret, vault)
            changed: int = (
                self.rows(key)
                .filter(pk=row.pk, key_id=row.key_id)
                .update(wrapped=wrapped, key_id=vault.ring.first.id)
            )
            return bool(changed)

    def _told(self) -> AbstractContextManager[None]:
        return as_storage_error(self.using, "read or write a session's key")

    def _make(self, key: SessionKey, vault: Vault) -> SessionSecret:
        row, _ = SessionSecret.objects.using(self.using).get_or_create(
            backend=self.alias,
            session_id=key.session_id,
            owner=owner_text(key.user_id),
            defaults={
                "key_id": vault.ring.first.id,
                "wrapped": _wrap(os.urandom(32), vault),
            },
        )
        # Another writer may have made it, and be about to destroy it.
        return self._lock(key) or row

    def _lock(self, key: SessionKey) -> SessionSecret | None:
        rows = self.rows(key)
        if connections[self.using].features.has_select_for_update:
            return rows.select_for_update().first()  # type: ignore[no-any-return]
        # SQLite: a transaction that reads first may be refused its turn to write.
        return rows.first() if rows.update(key_id=F("key_id")) else None


class KeyedBackend(WrappingBackend):
    """Derive the keys of each session of an alias."""

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
        # By database and schema: each tenant may have its own.
        self._permits: dict[tuple[str, str | None], Permits] = {}

    @cached_property
    def inner(self) -> BaseSessionBackend:
        """The backend that stores envelopes. Raises InvalidBackend."""
        inner = super().inner
        if inner.keeps_exactly:
            return inner
        self.close()
        raise InvalidBackend(
            f"AGENT_SESSIONS[{self.alias!r}] can't encrypt what {type(inner).__name__} "
            "stores: its service takes only items that it knows.",
            hint="Wrap an alias that stores any item.",
            id="agent_sessions.E013",
        )

    @property
    def _is_threaded(self) -> bool:
        """Whether async callers run the synchronous form in a thread.

        The sessions' keys lie in a database. What sets something on connections, or a
        router that goes by the thread, is heard there only.
        """
        return self.settings.session_keys or self._is_set_up

    @property
    def _is_set_up(self) -> bool:
        """Whether a project sets something on connections, such as a tenant's schema."""
        options = self.inner.options
        shared = options.get("connections") == "request"
        return shared or options.get("prepare_connection") is not None

    @property
    def permits(self) -> Permits:
        """Who may write with which key, by the rows of the directory's database."""
        using = self.directory.using
        place = (using, search_path(using) if self._is_set_up else None)
        if (found := self._permits.get(place)) is None:
            seconds = self.settings.key_refresh
            found = Permits(self.alias, using, self.source, seconds)
            # Another connection would not have what was set on this one.
            found.stays_within = self._is_set_up
            self._permits[place] = found
        return found

    @property
    def secrets(self) -> SessionSecrets:
        return SessionSecrets(self.alias, self.directory.using)

    def writer(
        self, key: SessionKey, purpose: bytes = b"", permit: Permit | None = None
    ) -> Vault:
        """Return what opens a session's items, and writes them while a permit lasts.

        Raises UnknownEncryptionKey, and what Permits.take() does.
        """
        return self._reader(key, purpose, permit or self.permits.take())

    async def avault(self, key: SessionKey) -> Vault:
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

    def rewrap(self, key: SessionKey) -> bool:
        """Encrypt a session's own key with the first one; return whether that was due.

        One that has none, being older than `session_keys`, gets one.
        """
        vault = self._vault(key, purpose=SECRETS, permit=self.permits.take())
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
            ring = self.source.get() if permit is None else permit.ring
        vault = Vault(
            ring,
            self._context(key) + purpose,
            key.session_id,
            lifetime=self.settings.lifetime,
            # A session's own key is read from its row each time.
            memory=None if purpose else self._memory,
            assert_writable=None if permit is None else permit.assert_valid,
        )
        # The SDK seals items only: what is bound to the id alone is no text or key.
        vault.accepts_sdk_envelopes = not purpose and self.settings.accept_sdk_envelopes
        return vault

    def _context(self, key: SessionKey) -> bytes:
        name = self.alias if self.settings.name is None else self.settings.name
        owner = None if key.user_id is None else str(key.user_id)
        return session_context(name, owner, key.session_id)

    def _forget(self, key: SessionKey) -> None:
        self._memory.forget(self._context(key))


def _wrap(secret: bytes, vault: Vault) -> str:
    return vault.seal_text(base64.b64encode(secret).decode())


def _unwrap(row: SessionSecret, vault: Vault) -> MasterKey:
    return MasterKey(base64.b64decode(vault.open_text(row.wrapped)))
