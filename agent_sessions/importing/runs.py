"""What runs have used: rows of AgentRun, and the session's sums."""

from __future__ import annotations

from typing import Any

from django.db.models import F, Max, Min

from agent_sessions.importing.records import SourceRun
from agent_sessions.importing.target import Target
from agent_sessions.models import AgentRun, AgentSession, SessionItem

TOKENS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
)


def write_runs(target: Target) -> int:
    """Write a session's runs that are new or have changed; tell how many."""
    session = target.session
    if not session.runs:
        return 0
    target.hold()
    row = target.row
    if row is None:
        return len(session.runs)
    runs: Any = AgentRun.objects.using(target.using).filter(session_id=row.pk)
    known = {run.run_id: run for run in runs}
    places = _places(target)
    added = dict.fromkeys(TOKENS, 0)
    new, changed = [], []
    for source in session.runs:
        columns = source.columns | _where(target, source, places)
        run = known.get(source.run_id)
        if run is not None and _same(run, columns):
            continue
        for name in TOKENS:
            before = getattr(run, name) if run is not None else 0
            added[name] += columns.get(name, 0) - before
        if run is None:
            new.append(AgentRun(session_id=row.pk, run_id=source.run_id, **columns))
        else:
            changed.append((run, columns))
    if not target.dry_run:
        AgentRun.objects.using(target.using).bulk_create(new, batch_size=200)
        for run, columns in changed:
            runs.filter(pk=run.pk).update(**columns)
        if new or changed:
            AgentSession.objects.using(target.using).filter(pk=row.pk).update(
                **{name: F(name) + value for name, value in added.items()}
            )
    return len(new) + len(changed)


def _places(target: Target) -> dict[tuple[int, int], tuple[int, int]]:
    """Find the first and last position of each turn that is asked for."""
    turns = {run.turn for run in target.session.runs if run.turn is not None}
    branches = [line.branch.pk for line in target.lines.values() if line.branch]
    if not turns:
        return {}
    rows = (
        SessionItem.objects.using(target.using)
        .filter(branch_id__in=branches)
        .values_list("branch_id", "turn")
        .annotate(first=Min("position"), last=Max("position"))
        .order_by()
    )
    return {(branch, turn): (first, last) for branch, turn, first, last in rows}


def _where(
    target: Target, run: SourceRun, places: dict[tuple[int, int], tuple[int, int]]
) -> dict[str, Any]:
    """Give the columns that say which items a run wrote."""
    line = target.lines.get(run.branch)
    if line is None or line.branch is None:
        return {}
    found = places.get((line.branch.pk, -1 if run.turn is None else run.turn))
    if found is None:
        return {"branch_id": line.branch.pk}
    first, last = found
    return {
        "branch_id": line.branch.pk,
        "first_position": first,
        "last_position": last,
    }


def _same(run: AgentRun, columns: dict[str, Any]) -> bool:
    return all(getattr(run, name) == value for name, value in columns.items())
