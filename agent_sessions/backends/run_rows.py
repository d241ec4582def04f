"""Everything that writes rows of runs: a run begins, goes on, ends or is copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db.models import QuerySet
from django.utils import timezone

from agent_sessions.models import AgentRun

Runs = QuerySet[AgentRun]
Status = AgentRun.Status


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
    return runs.update(**_fitted(columns))


def end(runs: Runs, status: str, error_code: str = "", **columns: Any) -> int:
    """Write down how runs ended; none of them can be resumed after that."""
    columns = {"finished_at": timezone.now(), "state": "", **columns}
    return write(runs, status=status, error_code=error_code, **columns)


def copy(using: str, runs: Iterable[AgentRun]) -> None:
    """Write rows of runs that come from another store or a file."""
    AgentRun._base_manager.using(using).bulk_create(runs, batch_size=200)


def _fitted(columns: dict[str, Any]) -> dict[str, Any]:
    sizes = {field.name: field.max_length for field in AgentRun._meta.fields}
    return {
        name: value[: sizes[name]] if isinstance(value, str) else value
        for name, value in columns.items()
    }
