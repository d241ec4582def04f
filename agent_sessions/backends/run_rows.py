"""Everything that writes rows of runs: a run begins, goes on, ends or is copied.

And what was told of it, which is kept for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Q, QuerySet
from django.utils import timezone

from agent_sessions.models import AgentRun, RunEvents

Runs = QuerySet[AgentRun]
Status = AgentRun.Status
# No events are kept for longer after a run's end.
EVENTS_KEPT = timedelta(hours=1)
# Runs of a session before one, in which its process looks for what others have left.
_BEFORE = 20
# Keys of one statement.
_KEYS = 500


def runs_of(using: str, session: int) -> Runs:
    """Return the runs of a session, by the key of its row."""
    runs: Runs = AgentRun._base_manager.using(using).filter(session_id=session)
    return runs


def newest(using: str, session: int) -> Runs:
    """Return the runs of a session, the newest first.

    With = for the session PostgreSQL may walk back through the runs of all others.
    """
    runs: Runs = AgentRun._base_manager.using(using)
    own = runs.filter(session_id__gte=session, session_id__lte=session)
    return own.order_by("-session_id", "-pk")


def create(using: str, session: int, run_id: str, **columns: Any) -> AgentRun:
    """Write a new run's row."""
    run: AgentRun = AgentRun._base_manager.using(using).create(
        session_id=session, run_id=run_id, **_fitted(columns)
    )
    return run


def write(runs: Runs, **columns: Any) -> int:
    """Change columns of runs; texts are cut to what their columns hold."""
    return runs.update(**_fitted(columns)) if columns else 0


def end(runs: Runs, status: str, error_code: str = "", **columns: Any) -> int:
    """Write down how runs ended; none of them can be resumed after that."""
    columns = {"finished_at": timezone.now(), "state": "", **columns}
    return write(runs, status=status, error_code=error_code, **columns)


def copy(using: str, runs: Iterable[AgentRun]) -> None:
    """Write rows of runs that come from another store or a file."""
    AgentRun._base_manager.using(using).bulk_create(runs, batch_size=200)


def add_events(using: str, events: list[RunEvents]) -> None:
    """Write events of runs; what is there already stays."""
    if events:
        rows = RunEvents._base_manager.using(using)
        rows.bulk_create(events, ignore_conflicts=True)


def events_of(using: str, runs: Any) -> QuerySet[RunEvents]:
    """Return what was told of runs, by their keys."""
    return _events(using).filter(run_id__in=runs)


def reseal(rows: QuerySet[Any], column: str, text: str) -> int:
    """Replace a sealed text of runs' rows by the same under another key."""
    return rows.update(**{column: text})


def remove_events(using: str, session: int, run: int, ended: datetime) -> None:
    """Remove what was told of a run, and of those that ended shortly before it."""
    newer = newest(using, session).filter(pk__lte=run)[:_BEFORE]
    _remove_events(
        using,
        [
            pk
            for pk, finished in newer.values_list("pk", "finished_at")
            if pk == run or (finished and finished <= ended)
        ],
    )


def remove_events_of(using: str, sessions: Iterable[int]) -> None:
    """Remove what was told of all runs of sessions, by the keys of their rows."""
    runs = AgentRun._base_manager.using(using).filter(session_id__in=sessions)
    _remove_events(using, runs.values_list("pk", flat=True))


def remove_old_events(using: str) -> None:
    """Remove what no process has removed, be it that it died."""
    since = timezone.now() - EVENTS_KEPT
    alive = Q(status=Status.RUNNING, session__run_seen_at__gt=since)
    old = _events(using).filter(written_at__lt=since)
    told = old.order_by().values_list("run_id", flat=True).distinct()
    for pks in _some(told):
        runs: Runs = AgentRun._base_manager.using(using).filter(pk__in=pks)
        over = runs.exclude(alive | Q(finished_at__gt=since))
        _remove_events(using, over.values_list("pk", flat=True))


def _remove_events(using: str, runs: Iterable[int]) -> None:
    # By keys: MariaDB reads and locks all rows to delete those that a subquery finds,
    # and PostgreSQL may read all runs, or all that was told of others, for a join.
    for pks in _some(runs):
        _events(using).filter(run_id__in=pks).delete()


def _some(runs: Iterable[int]) -> Iterator[list[int]]:
    keys = list(runs)
    for first in range(0, len(keys), _KEYS):
        yield keys[first : first + _KEYS]


def _events(using: str) -> QuerySet[RunEvents]:
    events: QuerySet[RunEvents] = RunEvents._base_manager.using(using)
    return events


def _fitted(columns: dict[str, Any]) -> dict[str, Any]:
    sizes = {field.name: field.max_length for field in AgentRun._meta.fields}
    return {
        name: value[: sizes[name]] if isinstance(value, str) else value
        for name, value in columns.items()
    }
