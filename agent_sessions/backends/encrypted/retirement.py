"""Older keys of an alias on their way out: nobody writes with them, then nobody may."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone

from agent_sessions.backends.encrypted.backend import EncryptedBackend
from agent_sessions.encryption.permit import clock
from agent_sessions.models import KeyUse, SessionSecret


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
        """For how many seconds it may be written with, if nobody takes it anew."""
        return max(0.0, self.since + self.quiet - clock())


class Retirement:
    """The keys of one alias that were written with before the first one.

    Making one takes a permit to write with the first key, and raises what that raises.
    """

    def __init__(self, backend: EncryptedBackend) -> None:
        self._permits = backend.permits
        # Another process may have kept other keys than the provider has now.
        self._known = set(backend.source.ask().ids)
        self.first = self._permits.take().key_id
        self._seconds = backend.settings.key_refresh
        self.writers: dict[str, Writers] = {}
        secrets = SessionSecret.objects.using(self._permits.using)
        with self._permits.asking():
            own = secrets.filter(backend=backend.alias).order_by()
            self.add(own.values_list("key_id", flat=True).distinct())
        self.look()

    def add(self, key_ids: Iterable[str]) -> None:
        """Watch keys under which something was found, even if they have no row yet."""
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
        """Look who writes, and retire keys with which nobody does any more.

        Tells whether there is none left. What was written with a key that is retired
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
        """Return the ids of the keys that nobody may write with any more."""
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
