"""A key of its own for each session, kept encrypted: destroyed, nothing opens again."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from django.db import connections, transaction
from django.db.models import F

from agent_sessions.backends.base import SessionKey
from agent_sessions.encryption import MasterKey, Vault
from agent_sessions.models import AgentSession, SessionSecret
from agent_sessions.reports import as_storage_error

# Secrets that were read before, by the session's id and owner.
KnownSecrets = Mapping[tuple[str, str], SessionSecret]


class SessionSecrets:
    """The secrets of one alias's sessions, in the directory's database."""

    def __init__(self, alias: str, using: str) -> None:
        self.alias = alias
        self.using = using

    def rows(self, key: SessionKey) -> Any:
        """Return a session's row, as a query set."""
        return SessionSecret.objects.using(self.using).filter(
            backend=self.alias,
            session_id=key.session_id,
            owner=_owner(key),
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
            row = known.get((key.session_id, _owner(key)))
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
        """Hold a session's key, made if it has none, to the end of a transaction.

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
        """Make the key of a session that has none; tell whether that was due.

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
        """Encrypt a session's key under the first master key; tell if that was due."""
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
            owner=_owner(key),
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
            found: SessionSecret | None = rows.select_for_update().first()
            return found
        # SQLite: a transaction that reads first may be refused its turn to write.
        return rows.first() if rows.update(key_id=F("key_id")) else None


def _owner(key: SessionKey) -> str:
    return "" if key.user_id is None else str(key.user_id)


def _wrap(secret: bytes, vault: Vault) -> str:
    return vault.seal_text(base64.b64encode(secret).decode())


def _unwrap(row: SessionSecret, vault: Vault) -> MasterKey:
    return MasterKey(base64.b64decode(vault.open_text(row.wrapped)))
