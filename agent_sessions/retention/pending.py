"""Histories whose session is deleted, and that their store is still to remove.

However a session's row is deleted, a PendingClear row is written in the same
transaction where its items lie in another store. They are removed when it commits; a
store that can't be reached then is asked again by retry_pending().
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from django.contrib.auth import get_user_model
from django.db import connections, transaction
from django.db.models import Count, QuerySet

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.remote.erasure import add_pending, erase_pending
from agent_sessions.backends.wrapping import forget_key, innermost
from agent_sessions.concurrency.connections import choosing
from agent_sessions.exceptions import InvalidBackend, StoreUnavailable
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession, Branch, PendingClear
from agent_sessions.retention.selection import CHUNK, chunks, databases

logger = logging.getLogger("agent_sessions.retention.pending")

# Seconds that a commit may take for it; the rest is left to retry_pending().
COMMIT_SECONDS = 5.0


@dataclass(slots=True)
class RetryReport:
    # Histories that are gone now, and their items.
    cleared: int = 0
    items: int = 0
    # Histories that are still there, by alias, and why: the last error's name.
    left: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)


def retry_pending(alias: str | None = None) -> RetryReport:
    """Remove what deleted sessions have left in their stores, of one alias or all.

    A store that can't be reached is reported, and the others go on. What another
    process is removing right now is left to it, and counts as left.
    """
    report = RetryReport()
    for rows in _pending():
        _erase(rows if alias is None else rows.filter(backend=alias), report)
    return report


def count_pending() -> dict[str, int]:
    """Return how many histories are still to be removed, by alias."""
    counts = Counter[str]()
    for rows in _pending():
        found = rows.values_list("backend").annotate(count=Count("pk"))
        counts.update(dict(found.order_by("backend")))
    return dict(counts)


def is_cleared(row: AgentSession) -> AgentSession:
    """Mark a row whose history was removed, so that its deletion leaves nothing."""
    row.history_is_cleared = True
    return row


def on_delete(
    sender: type[AgentSession], *, instance: AgentSession, using: str, **kwargs: Any
) -> None:
    """Write down what a deleted session leaves, in the transaction that deletes it."""
    if instance.history_is_cleared or instance.removed_at is not None:
        return
    with suppress(InvalidBackend):
        backend = sessions[instance.backend]
        with choosing(using):
            if backend.directory.using != using:
                # A move has left the row behind: the session is elsewhere.
                return
        # In this transaction: an earlier session's key must not serve a later one.
        forget_key(backend, SessionKey(instance.session_id, instance.user_id))
    if _keeps_outside(instance, using):
        _batch(using).pks.append(add_pending(using, instance).pk)


# -- inside ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Batch:
    """What one transaction leaves, tried when it commits."""

    using: str
    pks: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        report, until = RetryReport(), time.monotonic() + COMMIT_SECONDS
        rows = PendingClear.objects.using(self.using)
        for start in range(0, len(self.pks), CHUNK):
            _erase(rows.filter(pk__in=self.pks[start : start + CHUNK]), report, until)


def _batch(using: str) -> _Batch:
    """Return what the open transaction leaves so far."""
    # A rolled back savepoint takes its callbacks along, and a commit has called them.
    for entry in connections[using].run_on_commit:
        if isinstance(entry[1], _Batch):
            return entry[1]
    batch = _Batch(using)
    transaction.on_commit(batch, using=using, robust=True)
    return batch


def _keeps_outside(row: AgentSession, using: str) -> bool:
    """Return whether a session's items don't go with its row."""
    try:
        return innermost(sessions[row.backend]).keeps_outside
    except InvalidBackend:
        # Of an alias that is configured no longer only its rows can tell.
        branches = Branch._base_manager.using(using).filter(session_id=row.pk)
        return not branches.filter(head__gt=0).exists()


def _pending() -> Iterator[QuerySet[PendingClear]]:
    for using in databases(skip_broken=True):
        yield PendingClear.objects.using(using)


def _erase(
    rows: QuerySet[PendingClear], report: RetryReport, until: float | None = None
) -> None:
    """Remove what rows tell of; a store that is found down is asked no more."""
    down = set[str]()
    for row in chunks(rows):
        count = None
        if row.backend not in down and (until is None or time.monotonic() < until):
            try:
                count = erase_pending(sessions[row.backend], _key(row), row)
            except Exception as exc:
                # A store of somebody else's may raise anything; the row stays.
                name = report.reasons[row.backend] = type(exc).__name__
                if isinstance(exc, StoreUnavailable | InvalidBackend):
                    down.add(row.backend)
                told = "A deleted session's history is still in %r (%s)"
                logger.warning(told, row.backend, name)
        if count is None:
            report.left[row.backend] += 1
        else:
            report.cleared += 1
            report.items += count


def _key(row: PendingClear) -> SessionKey:
    pk: Any = get_user_model()._meta.pk
    owner = pk.to_python(row.owner) if row.owner else None
    return SessionKey(row.session_id, owner)
