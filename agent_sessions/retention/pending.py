"""Histories whose session is deleted, and that their store is still to remove.

However a session's row is deleted, a PendingClear row is written in the same
transaction where its items lie in another store. They are removed when it commits; a
store that can't be reached then is asked again by retry_pending().
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from django.contrib.auth import get_user_model
from django.db import connections, transaction
from django.db.models import Count

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.remote.erasure import add_pending, erase_pending
from agent_sessions.backends.wrapping import forget_key, innermost
from agent_sessions.exceptions import InvalidBackend, StoreUnavailable
from agent_sessions.handler import sessions
from agent_sessions.models import REMOVED, AgentSession, Branch, PendingClear

logger = logging.getLogger("agent_sessions.retention.pending")

# Seconds that a commit may take for it; the rest is left to retry_pending().
COMMIT_SECONDS = 5.0
_CHUNK = 500
_BATCH = "_agent_sessions_pending"


@dataclass(slots=True)
class Report:
    """What retry_pending() has done."""

    # Histories that are gone now, and their items.
    cleared: int = 0
    items: int = 0
    # Histories that are still there, by alias, and why: the last error's name.
    left: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Add what was done in another database."""
        self.cleared += other.cleared
        self.items += other.items
        self.reasons |= other.reasons
        for alias, count in other.left.items():
            self.left[alias] = self.left.get(alias, 0) + count


def retry_pending(alias: str | None = None) -> Report:
    """Remove what deleted sessions have left in their stores, of one alias or all.

    A store that can't be reached is reported, and the others go on. What another
    process is removing right now is left to it, and counts as left.
    """
    report = Report()
    for using in _databases():
        report.add(_retry(using, alias))
    return report


def count_pending() -> dict[str, int]:
    """Return how many histories are still to be removed, by alias."""
    counts: dict[str, int] = {}
    for using in _databases():
        rows = PendingClear.objects.using(using).values_list("backend")
        for alias, count in rows.annotate(count=Count("pk")).order_by("backend"):
            counts[alias] = counts.get(alias, 0) + count
    return counts


def is_cleared(row: AgentSession) -> AgentSession:
    """Say that a row's history was removed: its deletion then leaves nothing."""
    row.history_is_cleared = True
    return row


def on_delete(
    sender: type[AgentSession], *, instance: AgentSession, using: str, **kwargs: Any
) -> None:
    """Write down what a deleted session leaves, in the transaction that deletes it."""
    if instance.history_is_cleared:
        return
    with suppress(InvalidBackend):
        # In this transaction: an earlier session's key must not serve a later one.
        key = SessionKey(instance.session_id, instance.user_id)
        forget_key(sessions[instance.backend], key)
    if keeps_outside(instance, using):
        _batch(using).append(add_pending(using, instance).pk)


def keeps_outside(row: AgentSession, using: str) -> bool:
    """Return whether a session's items don't go with its row."""
    if row.backend == REMOVED:
        return False
    try:
        return innermost(sessions[row.backend]).keeps_outside
    except InvalidBackend:
        # Of an alias that is configured no longer only its rows can tell.
        branches = Branch._base_manager.using(using).filter(session_id=row.pk)
        return not branches.filter(head__gt=0).exists()


# -- inside ----------------------------------------------------------------------------


class _Batch:
    """What one transaction leaves, tried when it commits."""

    def __init__(self, using: str) -> None:
        self.using = using
        self.pks: list[int] = []

    def append(self, pk: int) -> None:
        self.pks.append(pk)

    def __call__(self) -> None:
        rows = PendingClear.objects.using(self.using)
        report, until = Report(), time.monotonic() + COMMIT_SECONDS
        for start in range(0, len(self.pks), _CHUNK):
            chunk = self.pks[start : start + _CHUNK]
            found = rows.filter(pk__in=chunk).order_by("pk")
            _erase(list(found), report, until=until)


def _batch(using: str) -> _Batch:
    """Return what the open transaction leaves so far."""
    connection = connections[using]
    batch: _Batch | None = getattr(connection, _BATCH, None)
    # A rolled back savepoint takes its callbacks along, and a commit has called them.
    if batch is None or not any(
        entry[1] is batch for entry in connection.run_on_commit
    ):
        batch = _Batch(using)
        setattr(connection, _BATCH, batch)
        transaction.on_commit(batch, using=using, robust=True)
    return batch


def _retry(using: str, alias: str | None) -> Report:
    report, down = Report(), set[str]()
    rows = PendingClear.objects.using(using).order_by("pk")
    if alias is not None:
        rows = rows.filter(backend=alias)
    after = 0
    while chunk := list(rows.filter(pk__gt=after)[:_CHUNK]):
        after = chunk[-1].pk
        _erase(chunk, report, down=down)
    return report


def _erase(
    rows: list[PendingClear],
    report: Report,
    *,
    down: set[str] | None = None,
    until: float | None = None,
) -> None:
    """Remove what rows tell of; a store that is found down is asked no more."""
    down = set() if down is None else down
    for row in rows:
        count = None
        if row.backend not in down and (until is None or time.monotonic() < until):
            try:
                backend = sessions[row.backend]
                count = erase_pending(backend, _key(row), row)
            except Exception as exc:
                # A store of somebody else's may raise anything; the row stays.
                name = type(exc).__name__
                report.reasons[row.backend] = name
                if isinstance(exc, StoreUnavailable | InvalidBackend):
                    down.add(row.backend)
                logger.warning(
                    "A deleted session's history is still in %r (%s)",
                    row.backend,
                    name,
                )
        if count is None:
            report.left[row.backend] = report.left.get(row.backend, 0) + 1
        else:
            report.cleared += 1
            report.items += count


def _key(row: PendingClear) -> SessionKey:
    pk: Any = get_user_model()._meta.pk
    owner = pk.to_python(row.owner) if row.owner else None
    return SessionKey(row.session_id, owner)


def _databases() -> list[str]:
    """Return the Django databases that may have sessions."""
    return sorted({backend.directory.using for backend in _backends()})


def _backends() -> Iterator[BaseSessionBackend]:
    yield sessions.database()
    for alias in sessions:
        try:
            yield sessions[alias]
        except InvalidBackend as exc:
            logger.warning("The backend %r can't be built (%s)", alias, exc.id)
