"""Examine sessions one by one, beside those who write to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from django.db import DatabaseError, router
from django.db.models import QuerySet

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.doctor.findings import Finding, Quarantined, Report, Skipped
from agent_sessions.doctor.quarantine import list_quarantined
from agent_sessions.doctor.session import Examination
from agent_sessions.doctor.turns import BATCH_SIZE
from agent_sessions.exceptions import AgentSessionError, InvalidBackend
from agent_sessions.handler import sessions as backends
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded

# Sessions of one query.
_CHUNK = 500


class Progress(Protocol):
    """Hears how many sessions and items have been read."""

    def __call__(self, sessions: int, items: int) -> None:
        """Hear the counts so far."""


@guarded
def examine(
    sessions: Iterable[AgentSession] | None = None,
    *,
    repair: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Report:
    """Look for what is broken in sessions, all of them if none are given.

    Nothing is written without `repair`. A session is read without holding it; where
    something is found it is read again while its writers wait, so what they are just
    writing is never taken for damage, and that is when it is mended. Sessions that a
    run holds are skipped. Only sessions whose items are in a Django database are
    looked at, and not where they are encrypted; others are skipped.
    """
    report = _Collected()
    for row in _each(sessions):
        try:
            backend = backends[row.backend]
        except InvalidBackend as exc:
            report.skip(row, str(exc), failed=True)
            continue
        rows = backend.in_database
        if rows is None:
            report.skip(row, why_closed(backend))
            continue
        try:
            _examine(rows, row, report, repair, batch_size, progress)
        except AgentSessionError as exc:
            report.skip(row, str(exc), failed=True)
        except DatabaseError as exc:
            # The driver's own words may quote contents.
            reason = f"The database refused to read it ({type(exc).__name__})."
            report.skip(row, reason, failed=True)
    return report.report()


def backend_of(row: AgentSession) -> DatabaseBackend:
    """Return the backend that has a session's items.

    Raises InvalidBackend, and TypeError where the doctor can't look into it.
    """
    backend = backends[row.backend]
    found = backend.in_database
    if found is None:
        raise TypeError(why_closed(backend))
    return found


def why_closed(backend: BaseSessionBackend) -> str:
    """Return why the doctor can't look into the sessions of a backend."""
    name = f"The backend {backend.alias!r}"
    if backend.encrypts:
        return f"{name} encrypts its items, so they can't be examined."
    if backend.inner_option is not None:
        return f"{name} wraps another one, so its items can't be examined."
    return f"{name} keeps its items in no Django database."


class _Collected:
    def __init__(self) -> None:
        self.examined = 0
        self.items = 0
        self.findings: list[Finding] = []
        self.skipped: list[Skipped] = []
        self.quarantined: list[Quarantined] = []

    def skip(self, row: AgentSession, reason: str, *, failed: bool = False) -> None:
        self.skipped.append(Skipped(row.pk, row.session_id, reason, failed))

    def report(self) -> Report:
        return Report(
            self.examined,
            self.items,
            tuple(self.findings),
            tuple(self.skipped),
            tuple(self.quarantined),
        )


def _examine(
    backend: DatabaseBackend,
    row: AgentSession,
    report: _Collected,
    repair: bool,
    batch_size: int,
    progress: Progress | None,
) -> None:
    def read(items: int) -> None:
        if progress is not None:
            progress(report.examined, report.items + items)

    rows = AgentSession.objects.using(backend.using).filter(pk=row.pk)

    def look(*, repair: bool) -> Examination | Skipped | None:
        fresh = rows.first()
        if fresh is None:
            return None
        if holds_a_run(fresh):
            reason = f"Run {fresh.run_id} is active."
            return Skipped(fresh.pk, fresh.session_id, reason)
        examination = Examination(
            backend, fresh, repair=repair, batch_size=batch_size, read=read
        )
        examination.run()
        return examination

    found = look(repair=False)
    if isinstance(found, Examination) and any(f.repair for f in found.findings):
        key = SessionKey(row.session_id, row.user_id)
        found = backend.change(key, lambda branches: look(repair=repair))
    if isinstance(found, Skipped):
        report.skipped.append(found)
    elif found is not None:
        report.quarantined += list_quarantined(backend.using, found.row)
        report.examined += 1
        report.items += found.items
        report.findings += found.findings


def _each(sessions: Iterable[AgentSession] | None) -> Iterator[AgentSession]:
    """Return the sessions, read from where they are written."""
    if sessions is None:
        for using in _databases():
            yield from _chunks(AgentSession.objects.using(using))
    elif isinstance(sessions, QuerySet):
        if sessions.db == router.db_for_read(AgentSession):
            # Nobody has named a database, and a replica may lag behind.
            sessions = sessions.using(router.db_for_write(AgentSession))
        yield from _chunks(sessions)
    else:
        yield from sessions


def _chunks(rows: QuerySet[AgentSession]) -> Iterator[AgentSession]:
    """Read a query in chunks, with no cursor held between them."""
    after = 0
    while True:
        chunk = list(rows.filter(pk__gt=after).order_by("pk")[:_CHUNK])
        yield from chunk
        if len(chunk) < _CHUNK:
            return
        after = chunk[-1].pk


def _databases() -> list[str]:
    """Name the Django databases that may have sessions."""
    found = {backends.database().directory.using}
    for alias in backends:
        # What can't be built is told of each of its sessions.
        with suppress(InvalidBackend):
            found.add(backends[alias].directory.using)
    return sorted(found)
