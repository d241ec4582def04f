"""What runs used, by turn and branch: rows of runs, counted while their turn is there.

The session's own counters hold everything that was ever used; these answers leave out
turns that were popped, undone, cleared or deleted with their branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from django.db.models import F, OuterRef, Subquery
from django.utils import timezone

from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Lineages, visible
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.usage import Spent

SUMS = ("requests", "input_tokens", "output_tokens", "total_tokens")
DETAILS = ("input_tokens_details", "output_tokens_details")


@dataclass(frozen=True, slots=True)
class Opening:
    """The user message that opens the last turn of a branch."""

    item: int
    position: int
    turn: int


def opening(using: str, lineages: Lineages, branch_id: int) -> Opening | None:
    """Find the user message that opens a branch's last turn.

    Each segment is walked backwards on its index, the newest first.
    """
    for segment in lineages.of(branch_id):
        found = (
            visible(using, (segment,))
            .filter(type="message", role="user")
            .order_by("-position")
            .values_list("pk", "position", "turn")
            .first()
        )
        if found is not None:
            return Opening(*found)
    return None


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that the caller started himself and that has given its result."""

    spent: Spent
    agent_name: str = ""
    model: str = ""
    trace_id: str = ""
    # The row that it has already, where it was recorded as it went.
    run_id: str | None = None


def store(branches: Branches, run: Finished) -> None:
    """Record what a run used for the branch's last turn, whose row the caller holds.

    Said again for the same turn it replaces what was said before, as
    AdvancedSQLiteSession does; what the run manager or SessionHooks recorded stays.
    """
    branch = branches.current()
    if branch is None:
        return
    runs = AgentRun.objects.using(branches.using).filter(session_id=branch.session_id)
    if run.run_id is not None and runs.filter(run_id=run.run_id).exists():
        return
    opened = opening(branches.using, branches.lineages, branch.pk)
    if opened is None:
        return
    run_id = f"turn-{branch.pk}-{opened.item}"
    before = runs.filter(run_id=run_id).values(*run.spent.counters()).first() or {}
    AgentSession.objects.using(branches.using).filter(pk=branch.session_id).update(
        **{
            name: F(name) - before.get(name, 0) + used
            for name, used in run.spent.counters().items()
        }
    )
    runs.update_or_create(
        session_id=branch.session_id,
        run_id=run_id,
        defaults={
            "branch": branch,
            "agent_name": run.agent_name[:255],
            "model": run.model[:255],
            "trace_id": run.trace_id[:64],
            "status": AgentRun.Status.COMPLETED,
            "finished_at": timezone.now(),
            "first_position": opened.position,
            "last_position": branch.head,
            "turn": opened.turn,
            "turn_item": opened.item,
            **run.spent.columns(),
        },
    )


def session_usage(branches: Branches, name: str | None) -> dict[str, int] | None:
    """Sum up what all branches used, or one."""
    wanted = _root_name(name) if name else None
    rows = [row for row in _rows(branches) if wanted in {None, row.branch}]
    if not rows:
        return None
    turns = {(row.branch, row.turn) for row in rows}
    return {**_sums(rows), "total_turns": len(turns)}


def turn_usage(
    branches: Branches, turn: int | None, name: str | None
) -> list[dict[str, Any]] | dict[str, Any]:
    """Tell what each turn of a branch used, or what one did; {} where nothing is."""
    if name is None:
        branch = branches.current()
        name = MAIN_BRANCH if branch is None else branch.name
    wanted = _root_name(name)
    by_turn: dict[int, list[_Row]] = {}
    for row in _rows(branches, turn, details=True):
        if row.branch == wanted:
            by_turn.setdefault(row.turn, []).append(row)
    if turn is not None:
        return _described(by_turn[turn]) if turn in by_turn else {}
    return [
        {"user_turn_number": number, **_described(by_turn[number])}
        for number in sorted(by_turn)
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    branch: str
    turn: int
    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int
    usage: dict[str, Any]


def _rows(
    branches: Branches, turn: int | None = None, *, details: bool = False
) -> Iterator[_Row]:
    """Read the runs whose turn a branch still shows, each for one branch.

    One query for all branches; what each shows is looked up in its lineage.
    """
    using = branches.using
    sessions = branches.directory.rows(branches.key).values("pk")
    names = dict(
        Branch.objects.using(using)
        .filter(session_id__in=sessions)
        .values_list("pk", "name")
    )
    if not names:
        branches.directory.assert_own(branches.key)
    live = dict(
        Branch.objects.using(using)
        .filter(session_id__in=sessions, archived_at=None)
        .order_by("pk")
        .values_list("name", "pk")
    )
    shown = {_root_name(name): branches.lineages.of(pk) for name, pk in live.items()}
    item = SessionItem.objects.using(using).filter(pk=OuterRef("turn_item"))
    runs = AgentRun.objects.using(using).filter(session_id__in=sessions)
    if turn is not None:
        runs = runs.filter(turn=turn)
    columns = [field.name for field in fields(_Row)[1:]]
    found = (
        runs.filter(branch__isnull=False, turn_item__isnull=False)
        .annotate(
            opened_on=Subquery(item.values("branch_id")),
            opened_at=Subquery(item.values("position")),
        )
        .order_by("pk")
        .values_list(
            "branch_id",
            "opened_on",
            "opened_at",
            *(columns if details else columns[:-1]),
        )
    )
    for branch_id, opened_on, opened_at, *values in found:
        if opened_on is None:
            continue
        own = _root_name(names.get(branch_id, ""))
        # Else the oldest that shows it: an undone turn that was restored, or a fork.
        for name in (own, *shown):
            if any(
                segment.branch_id == opened_on and segment.holds(opened_at)
                for segment in shown.get(name, ())
            ):
                yield _Row(name, *values, *([] if details else [{}]))
                break


def _root_name(name: str) -> str:
    """Give the name that a branch had before an undo archived it as `name~number`."""
    return name.partition("~")[0][:200]


def _sums(rows: list[_Row]) -> dict[str, int]:
    return {name: sum(getattr(row, name) for row in rows) for name in SUMS}


def _described(rows: list[_Row]) -> dict[str, Any]:
    return {**_sums(rows), **{name: _details(rows, name) for name in DETAILS}}


def _details(rows: list[_Row], name: str) -> dict[str, Any] | None:
    """Add up the details of a turn's runs; None where none has any."""
    total: dict[str, Any] = {}
    for row in rows:
        for part in row.usage.get(name) or []:
            for key, value in part.items():
                # What isn't a count can't be added up: the last one is told.
                known = total.get(key)
                both = isinstance(value, int) and isinstance(known, int)
                total[key] = known + value if both else value
    return total or None
