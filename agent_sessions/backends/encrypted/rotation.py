"""Encrypt what is stored with the first key, and retire the keys before it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from django.db.models import QuerySet
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted.refreshed import clock
from agent_sessions.backends.reading import pages
from agent_sessions.encryption import Vault
from agent_sessions.encryption.keys import TEXTS
from agent_sessions.exceptions import UnknownEncryptionKey
from agent_sessions.items import Item, decode
from agent_sessions.models import AgentSession, KeyUse, SessionSecret
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from agent_sessions.backends.encrypted.keyed import KeyedBackend
    from agent_sessions.backends.encrypted.keys import Permit


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
    unknown: Counter[str] = field(default_factory=Counter)
    # The ids of the keys under which something was found.
    older: set[str] = field(default_factory=set)

    @property
    def left(self) -> int:
        return self.unreadable + self.fixed + sum(self.unknown.values())

    def add(self, other: Rotated) -> None:
        self.items += other.items
        self.texts += other.texts
        self.keys += other.keys
        self.unreadable += other.unreadable
        self.fixed += other.fixed
        self.unknown += other.unknown
        self.older |= other.older


class Rotation:
    """One session's items, its runs' texts and its own key.

    What is under the first key already is passed over, so a rotation that broke off
    goes on where it was. Writers needn't wait: each row is compared before it changes.
    """

    def __init__(self, backend: KeyedBackend, row: AgentSession) -> None:
        self._backend = backend
        self._row = row
        self._key = SessionKey(row.session_id, row.user_id)
        self._permit: Permit | None = None
        self._vaults: dict[bytes, Vault] = {}
        self.done = Rotated()

    @guarded
    def run(self, *, batch_size: int) -> Rotated:
        """Rotate what is there now. Raises StorageError."""
        try:
            self.done.keys += self._backend.rewrap(self._key)
            first = self._vault().ring.first.id
        except UnknownEncryptionKey as exc:
            # The session's own key doesn't open, so nothing of the session does.
            self.done.unknown[exc.key_id] += 1
            return self.done
        if (rows := self._backend.inner.in_database) is not None:
            self.done.items += rows.rewrite(
                self._key,
                self._change,
                unless=f'"kid":"{first}"',
                batch_size=batch_size,
            )
        else:
            kids = _kids(self._backend, self._key, batch_size)
            self.done.fixed += sum(kid != first for kid in kids)
        self._rotate_texts()
        return self.done

    def _vault(self, purpose: bytes = b"") -> Vault:
        """Return what writes now: a long session outlives a permit."""
        permit = self._backend.permits.take()
        if permit is not self._permit:
            self._permit, self._vaults = permit, {}
        if purpose not in self._vaults:
            vault = self._backend.writer(self._key, purpose, permit)
            self._vaults[purpose] = vault
        return self._vaults[purpose]

    def _change(self, item: Item, purpose: bytes = b"") -> Item | None:
        vault = self._vault(purpose)
        try:
            new = vault.reseal(item)
        except UnknownEncryptionKey as exc:
            self.done.unknown[exc.key_id] += 1
            return None
        kid = item.get("kid")
        if new is not None:
            self.done.older.add(str(kid))
        elif kid != vault.ring.first.id:
            self.done.unreadable += 1
        return new

    def _rotate_texts(self) -> None:
        """Rotate what is sealed of runs: it binds a text to its run, and stays."""
        using = cast("str", self._row._state.db)
        runs = run_rows.runs_of(using, self._row.pk)
        self._rotate_column(runs.exclude(state=""), "state")
        told = run_rows.events_of(using, runs.values("pk"))
        for run in list(told.values_list("run_id", flat=True).distinct()):
            self._rotate_column(told.filter(run_id=run), "body")

    def _rotate_column(self, rows: QuerySet[Any], column: str) -> None:
        for pk, text in list(rows.values_list("pk", column)):
            item = decode(text)
            new = None if item is None else self._change(item, TEXTS)
            if new is not None:
                unchanged = rows.filter(pk=pk, **{column: text})
                self.done.texts += run_rows.reseal(unchanged, column, json.dumps(new))


def rotate_rest(backend: KeyedBackend, batch_size: int) -> Rotated:
    """Rotate what belongs to sessions without a row. Raises StorageError."""
    done, first = Rotated(), backend.permits.take().key_id
    directory = backend.directory
    rows = SessionSecret.objects.using(directory.using).filter(backend=backend.alias)
    for row in rows.exclude(key_id=first).order_by("pk").iterator():
        key = SessionKey(row.session_id, row.owner or None)
        if directory.rows(key).exists():
            # Rotation has told of it.
            continue
        try:
            done.keys += backend.rewrap(key)
        except UnknownEncryptionKey as exc:
            done.unknown[exc.key_id] += 1
    if backend.inner.supports_listing:
        older = set(backend.source.get().ids) - {first}
        for session_id in cast("Any", backend.inner).list_ids():
            key = SessionKey(session_id)
            if not directory.rows(key).exists():
                # Another alias may have sessions there too.
                kids = _kids(backend, key, batch_size)
                done.fixed += sum(kid in older for kid in kids)
    return done


def _kids(
    backend: KeyedBackend, key: SessionKey, batch_size: int
) -> Iterator[str | None]:
    """Return the id of the key of each item that is stored; None for one without."""
    for page in pages(backend.inner, key, size=batch_size):
        for stored in page.items:
            if stored.item is not None:
                yield stored.item.get("kid")


@dataclass(slots=True)
class Writers:
    """Who may still write with an older key, as far as its row tells."""

    takings: int
    # Seconds, in clock()'s time.
    since: float
    quiet: float
    # Who has taken it since it is watched.
    holders: set[str] = field(default_factory=set)

    @property
    def left(self) -> float:
        return max(0.0, self.since + self.quiet - clock())


class Retirement:
    """The keys of one alias that were written with before the first one.

    Making one takes a permit to write with the first key, and raises what that raises.
    """

    def __init__(self, backend: KeyedBackend) -> None:
        self._permits = backend.permits
        # Another process may have kept other keys than the provider has now.
        self._known = set(backend.source.fetch().ids)
        self.first = self._permits.take().key_id
        self._seconds = backend.settings.key_refresh
        self.writers: dict[str, Writers] = {}
        secrets = SessionSecret.objects.using(self._permits.using)
        with self._permits.asking():
            own = secrets.filter(backend=backend.alias).order_by()
            self.add(own.values_list("key_id", flat=True).distinct())
        self.look()

    def add(self, key_ids: Iterable[str]) -> None:
        with self._permits.asking():
            for key_id in (set(key_ids) & self._known) - {self.first}:
                row, made = self._permits.rows().get_or_create(
                    backend=self._permits.alias,
                    key_id=key_id,
                    defaults={"seconds": self._seconds},
                )
                if made:
                    self.writers[key_id] = _watched(row, {}, clock())

    def look(self, *, retire: bool = True) -> bool:
        """Find out who writes, and retire keys with which nobody does any more.

        Return whether there is none left. What was written with a key that is retired
        here may still be there: everything is to be looked through after that.
        """
        with self._permits.asking():
            rows = list(self._rows().filter(retired_at=None))
            # Whoever took a key did so before.
            now, before = clock(), self.writers
            self.writers = {}
            for row in rows:
                known = before.get(row.key_id)
                if not (retire and self._is_retired(row, known)):
                    self.writers[row.key_id] = _watched(row, before, now)
        return not self.writers

    def retired(self) -> list[str]:
        with self._permits.asking():
            rows = self._rows().exclude(retired_at=None).order_by("key_id")
            return list(rows.values_list("key_id", flat=True))

    def _rows(self) -> Any:
        return self._permits.rows().exclude(key_id=self.first)

    def _is_retired(self, row: KeyUse, writers: Writers | None) -> bool:
        if writers is None or writers.takings != row.takings or writers.left:
            return False
        # Who takes it meanwhile counts it up.
        unused = self._rows().filter(pk=row.pk, takings=row.takings, retired_at=None)
        return bool(unused.update(retired_at=timezone.now()))


def _watched(row: KeyUse, before: dict[str, Writers], now: float) -> Writers:
    known = before.get(row.key_id)
    if known is not None and known.takings == row.takings:
        return known
    holders = set() if known is None else known.holders | {row.holder}
    return Writers(row.takings, now, 2 * row.seconds, holders)
