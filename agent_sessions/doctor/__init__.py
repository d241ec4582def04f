"""Find what is broken in stored sessions, and mend it without destroying anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.db import DatabaseError, router
from django.db.models import QuerySet

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.lineage import BATCH_SIZE, renumber
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.doctor.findings import CODES, Finding, Quarantined, Report, Skipped
from agent_sessions.doctor.rows import list_quarantined, take_back
from agent_sessions.doctor.session import Examination, Progress, no_progress
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded
from agent_sessions.retention import store_of
from agent_sessions.retention.selection import chunks, databases

__all__ = [
    "CODES",
    "Finding",
    "Quarantined",
    "Report",
    "Skipped",
    "examine",
    "restore",
    "why_closed",
]


class CantExamine(AgentSessionError, TypeError):
    """The doctor can't look into the sessions of a backend; the message says why."""


@guarded
def examine(
    sessions: Iterable[AgentSession] | None = None,
    *,
    repair: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
    report: Report | None = None,
) -> Report:
    """Look for what is broken in sessions, all of them if none are given.

    Nothing is written without `repair`. A session is read without holding it; where
    something is found it is read again while its writers wait, so what they are just
    writing is never taken for damage, and that is when it is mended. Sessions that a
    run holds are skipped. Only sessions whose items are in a Django database are
    looked at, and not where they are encrypted; others are skipped. `progress` hears
    how many items each page had. A `report` that is given is gone on with.
    """
    report = report or Report()
    for row in _each(sessions):
        reason, failed = "", True
        try:
            found = _examine(row, repair, batch_size, progress)
        except CantExamine as exc:
            reason, failed = str(exc), False
        except AgentSessionError as exc:
            reason = str(exc)
        except DatabaseError as exc:
            # The driver's own words may quote contents.
            reason = f"The database refused to read it ({type(exc).__name__})."
        else:
            if isinstance(found, Examination):
                report.quarantined += list_quarantined(found.using, found.row)
                report.sessions += 1
                report.items += found.items
                report.findings += found.findings
            elif found is not None:
                reason, failed = found, False
        if reason:
            report.skipped.append(Skipped(row.pk, row.session_id, reason, failed))
    return report


@guarded
def restore(session: AgentSession, position: int, *, branch: str | None = None) -> None:
    """Move a row from the quarantine back to where it was.

    `branch` names the branch that it was on, where several lost a row of that
    position. Raises SessionItem.DoesNotExist and MultipleObjectsReturned, TypeError
    where the doctor can't look into the backend, and InvalidBackend.
    """
    backend = _backend_of(session)

    def move(_: Any) -> None:
        take_back(backend.using, session, position, branch)
        renumber(backend.using, session.pk)

    backend.change(SessionKey(session.session_id, session.user_id), move)


def why_closed(backend: BaseSessionBackend) -> str:
    """Return why the doctor can't look into the sessions of a backend."""
    name = f"The backend {backend.alias!r}"
    if backend.encrypts:
        return f"{name} encrypts its items, so they can't be examined."
    if backend.inner_option is not None:
        return f"{name} wraps another one, so its items can't be examined."
    return f"{name} keeps its items in no Django database."


def _backend_of(row: AgentSession) -> DatabaseBackend:
    """Return what has a session's items. Raises InvalidBackend and CantExamine."""
    backend, _ = store_of(row)
    if (found := backend.in_database) is None:
        raise CantExamine(why_closed(backend))
    return found


def _examine(
    row: AgentSession, repair: bool, batch_size: int, progress: Progress
) -> Examination | str | None:
    """Examine a session; return why it was not, or None where it is gone."""
    backend = _backend_of(row)
    rows = AgentSession.objects.using(backend.using).filter(pk=row.pk)

    def look(repair: bool, progress: Progress) -> Examination | str | None:
        fresh = rows.first()
        if fresh is None:
            return None
        if holds_a_run(fresh):
            return f"Run {fresh.run_id} is active."
        examination = Examination(
            backend, fresh, repair=repair, batch_size=batch_size, progress=progress
        )
        examination.run()
        return examination

    found = look(False, progress)
    if isinstance(found, Examination) and any(f.repair for f in found.findings):
        key = SessionKey(row.session_id, row.user_id)
        found = backend.change(key, lambda branches: look(repair, no_progress))
    return found


def _each(sessions: Iterable[AgentSession] | None) -> Iterator[AgentSession]:
    """Return the sessions, read from where they are written."""
    if sessions is None:
        # What can't be built is told of each of its sessions.
        for using in databases(skip_broken=True):
            yield from chunks(AgentSession.objects.using(using))
    elif isinstance(sessions, QuerySet):
        if sessions.db == router.db_for_read(AgentSession):
            # Nobody has named a database, and a replica may lag behind.
            sessions = sessions.using(router.db_for_write(AgentSession))
        yield from chunks(sessions)
    else:
        yield from sessions
