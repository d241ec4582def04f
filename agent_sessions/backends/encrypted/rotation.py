"""Put what is stored under the first key of the ring, session by session."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted.backend import TEXTS, EncryptedBackend
from agent_sessions.encryption import Vault
from agent_sessions.exceptions import UnknownEncryptionKey
from agent_sessions.items import Item, decode
from agent_sessions.models import AgentRun, AgentSession


@dataclass(slots=True)
class Rotated:
    """What was put under the first key, and what could not be."""

    items: int = 0
    texts: int = 0
    keys: int = 0
    # Rows that don't open, or were not encrypted.
    unreadable: int = 0
    # Rows under other keys in a store that can't rewrite them.
    fixed: int = 0
    # Rows by the id of a key that isn't in the ring.
    unknown: dict[str, int] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many rows are as they were."""
        return self.unreadable + self.fixed + sum(self.unknown.values())

    def add(self, other: Rotated) -> None:
        """Add what was done in another session."""
        self.items += other.items
        self.texts += other.texts
        self.keys += other.keys
        self.unreadable += other.unreadable
        self.fixed += other.fixed
        for key_id, count in other.unknown.items():
            self.unknown[key_id] = self.unknown.get(key_id, 0) + count


class Rotation:
    """One session's items, its runs' texts and its own key.

    What is under the first key already is passed over, so a rotation that broke off
    goes on where it was. Writers needn't wait: each row is compared before it changes.
    """

    def __init__(self, backend: EncryptedBackend, row: AgentSession) -> None:
        self._backend = backend
        self._row = row
        self._key = SessionKey(row.session_id, row.user_id)
        self.done = Rotated()

    def run(self, *, batch_size: int) -> Rotated:
        """Rotate what is there now. Raises StorageError."""
        try:
            self.done.keys += self._backend.rewrap(self._key)
            vault = self._backend.vault(self._key)
        except UnknownEncryptionKey as exc:
            # The session's own key doesn't open, so nothing of the session does.
            self._miss(exc.key_id)
            return self.done
        first = vault.ring.first.id
        if self._backend.inner.supports_rewriting:
            self.done.items += self._backend.inner.rewrite(
                self._key,
                lambda item: self._change(vault, item),
                unless=f'"kid":"{first}"',
                batch_size=batch_size,
            )
        else:
            self._count_fixed(vault, batch_size)
        self._rotate_texts(self._backend.vault(self._key, TEXTS))
        return self.done

    def _count_fixed(self, vault: Vault, batch_size: int) -> None:
        first, after = vault.ring.first.id, 0
        while True:
            page = self._backend.inner.page(self._key, after=after, limit=batch_size)
            self.done.fixed += sum(
                stored.item is not None
                and vault.carrier.unload(stored.item).get("kid") != first
                for stored in page.items
            )
            if not page.items or not page.has_later:
                return
            after = page.items[-1].position

    def _change(self, vault: Vault, item: Item) -> Item | None:
        try:
            new = vault.reseal(item)
        except UnknownEncryptionKey as exc:
            self._miss(exc.key_id)
            return None
        kid = vault.carrier.unload(item).get("kid")
        if new is None and kid != vault.ring.first.id:
            self.done.unreadable += 1
        return new

    def _rotate_texts(self, vault: Vault) -> None:
        rows = AgentRun._base_manager.using(self._row._state.db)
        # What is sealed in there binds it to its run, and stays.
        own = rows.filter(session_id=self._row.pk).exclude(state="")
        for pk, text in list(own.values_list("pk", "state")):
            item = decode(text)
            new = None if item is None else self._change(vault, item)
            if new is not None:
                self.done.texts += rows.filter(pk=pk, state=text).update(
                    state=json.dumps(new)
                )

    def _miss(self, key_id: str) -> None:
        self.done.unknown[key_id] = self.done.unknown.get(key_id, 0) + 1
