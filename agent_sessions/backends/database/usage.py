"""What runs used, by turn and branch: rows of runs, counted while their turn is there.

The session's own counters hold everything that was ever used; these answers leave out
turns that were popped, undone, cleared or deleted with their branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import uuid4

from django.db.models import F, OuterRef, QuerySet, Subquery
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Lineages, Segment, visible
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import MAIN_BRANCH, AgentRun, AgentSession, SessionItem
from agent_sessions.usage import COUNTERS, DETAILS, Spent

SUMS = ("requests", "input_tokens", "output_tokens", "total_tokens")
# How the ids of the runs begin that store() writes.
STORED = "turn-"


@dataclass(frozen=True, slots=True)
class Opening:
    """The user message that opens the last turn of a branch, or turn 0's first item."""

    item: int
    position: int
    turn: int


def opening(using: str, lineages: Lineages, branch_id: int) -> Opening | None:
    """Find the user message that opens a branch's last turn.

    Each segment is walked backwards on its index, the newest first.
    """
    segments = lineages.of(branch_id)
    return _first(using, segments, "-position", **OPENING)


def _first(
    using: str, segments: Iterable[Segment], order: str, **kind: str
) -> Opening | None:
    for segment in segments:
        rows = visible(using, (segment,)).filter(**kind).order_by(order)
        found = rows.values_list("pk", "position", "turn").first()
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
    runs = run_rows.runs_of(branches.using, branch.session_id)
    if run.run_id is not None and runs.filter(run_id=run.run_id).exists():
        return
    opened = opening(branches.using, branches.lineages, branch.pk)
    if opened is None:
        # Without a user's message the first item opens turn 0.
        oldest = reversed(branches.segments(branch))
        opened = _first(branches.using, oldest, "position")
    if opened is None:
        return
    # What was stored for the turn before, also before the branch was rebuilt. Clients
    # choose the ids of their runs, but the SDK's version is on those rows.
    stored = runs.filter(
        run_id__startswith=STORED,
        sdk_version="",
        turn_item=opened.item,
        branch__name=branch.name,
    )
    before = stored.order_by("-pk").values("pk", *COUNTERS).first() or {}
    AgentSession.objects.using(branches.using).filter(pk=branch.session_id).update(
        **{
            name: F(name) - before.get(name, 0) + used
            for name, used in run.spent.counters().items()
        }
    )
    columns = {
        "branch": branch,
        "agent_name": run.agent_name,
        "model": run.model,
        "trace_id": run.trace_id,
        "status": AgentRun.Status.COMPLETED,
        "finished_at": timezone.now(),
        "first_position": opened.position,
        "last_position": branch.head,
        "turn": opened.turn,
        "turn_item": opened.item,
        **run.spent.columns(),
    }
    if before:
        run_rows.write(runs.filter(pk=before["pk"]), **columns)
    else:
        run_id = f"{STORED}{uuid4().hex}"
        run_rows.create(branches.using, branch.session_id, run_id, **columns)


def session_usage(branches: Branches, name: str | None) -> dict[str, int] | None:
    """Sum up what all branches used, or one. Raises BranchDoesNotExist."""
    if name:
        branches.named(name)
    rows = [row for row in _rows(branches) if not name or row["branch"] == name]
    if not rows:
        return None
    turns = {(row["branch"], row["turn"]) for row in rows}
    return {**_sums(rows), "total_turns": len(turns)}


def turn_usage(
    branches: Branches, turn: int | None, name: str | None
) -> list[dict[str, Any]] | dict[str, Any]:
    """Return what each turn of a branch used, or what one did; {} where nothing is.

    Raises BranchDoesNotExist.
    """
    branch = branches.named(name)
    name = MAIN_BRANCH if branch is None else branch.name
    only = {} if turn is None else {"turn": turn}
    by_turn: dict[int, list[_Row]] = {}
    for row in _rows(branches, "usage", **only):
        if row["branch"] == name:
            by_turn.setdefault(row["turn"], []).append(row)
    if turn is not None:
        return _described(by_turn[turn]) if turn in by_turn else {}
    return [
        {"user_turn_number": number, **_described(by_turn[number])}
        for number in sorted(by_turn)
    ]


_Row = dict[str, Any]


def _rows(branches: Branches, *more: str, **only: Any) -> Iterator[_Row]:
    """Read the runs whose turn a branch still shows, each with that branch's name."""
    found = list(branches.every().order_by("pk"))
    if not found:
        branches.directory.assert_own(branches.key)
    names = {branch.pk: branch.name for branch in found}
    live = {branch.name: branch for branch in found if branch.archived_at is None}
    segments = cache(branches.segments)

    def shows(name: str, row: _Row) -> bool:
        return name in live and any(
            segment.branch_id == row["opened_on"] and segment.holds(row["opened_at"])
            for segment in segments(live[name])
        )

    for row in _opened_runs(branches, only).values(
        "branch_id", "opened_on", "opened_at", "turn", *SUMS, *more
    ):
        # The run's own branch, while it shows the turn's first item. Then the oldest
        # that shows it, a fork or where the turn was restored; but what was used for
        # an inherited turn goes to nobody else, who has that turn's own usage.
        own = names.get(row["branch_id"])
        if own is None or row["opened_on"] is None:
            continue
        other = live if own == names.get(row["opened_on"]) else ()
        shown = (name for name in (own, *other) if shows(name, row))
        if (name := next(shown, None)) is not None:
            yield row | {"branch": name}


def _opened_runs(branches: Branches, only: dict[str, Any]) -> QuerySet[Any]:
    """Return runs with the place of the item that opens their turn."""
    using = branches.using
    item = SessionItem._base_manager.using(using).filter(pk=OuterRef("turn_item"))
    runs: Any = AgentRun._base_manager.using(using).filter(
        session_id=branches.directory.pk_of(branches.key), **only
    )
    found: QuerySet[Any] = runs.annotate(
        opened_on=Subquery(item.values("branch_id")),
        opened_at=Subquery(item.values("position")),
    )
    return found.order_by("pk")


def _sums(rows: list[_Row]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in SUMS}


def _described(rows: list[_Row]) -> dict[str, Any]:
    return {**_sums(rows), **{name: _details(rows, name) for name in DETAILS}}


def _details(rows: list[_Row], name: str) -> dict[str, Any] | None:
    """Add up the details of a turn's runs; None where none has any."""
    total: dict[str, Any] = {}
    for row in rows:
        for part in row["usage"].get(name) or []:
            for key, value in part.items():
                # What isn't a count can't be added up: the last one is told.
                known = total.get(key)
                both = isinstance(value, int) and isinstance(known, int)
                total[key] = known + value if both else value
    return total or None
