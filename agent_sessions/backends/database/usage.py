"""What runs used, by turn and branch: rows of runs, counted while their turn is there.

The session's own counters hold everything that was ever used; these answers leave out
turns that were popped, undone, cleared or deleted with their branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any
from uuid import uuid4

from django.db.models import F, OuterRef, QuerySet, Subquery
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Lineages, Segment, visible
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
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
    before = _stored(branches, runs, branch, opened)
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


def _stored(
    branches: Branches, runs: QuerySet[Any], branch: Branch, opened: Opening
) -> dict[str, Any]:
    """Find what was stored for a turn of a branch, also before the branch was rebuilt.

    Gives the row's key and counters; {} where there is none.
    """
    # Clients choose the ids of their runs, but the SDK's version is on those rows.
    stored = runs.filter(
        run_id__startswith=STORED, sdk_version="", turn_item=opened.item
    )
    found = list(stored.order_by("-pk").values("pk", "branch_id", *COUNTERS))
    if not found:
        return {}
    names = _Names(branches)
    same = (row for row in found if names.of(row["branch_id"]) == branch.name)
    return next(same, {})


def session_usage(branches: Branches, name: str | None) -> dict[str, int] | None:
    """Sum up what all branches used, or one. Raises BranchDoesNotExist."""
    if name:
        branches.named(name)
    rows = [row for row in _rows(branches) if not name or row.branch == name]
    if not rows:
        return None
    turns = {(row.branch, row.turn) for row in rows}
    return {**_sums(rows), "total_turns": len(turns)}


def turn_usage(
    branches: Branches, turn: int | None, name: str | None
) -> list[dict[str, Any]] | dict[str, Any]:
    """Return what each turn of a branch used, or what one did; {} where nothing is.

    Raises BranchDoesNotExist.
    """
    branch = branches.named(name)
    name = MAIN_BRANCH if branch is None else branch.name
    by_turn: dict[int, list[_Row]] = {}
    for row in _rows(branches, turn, details=True):
        if row.branch == name:
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
    """Read the runs whose turn a branch still shows, each for one branch."""
    using = branches.using
    names = _Names(branches)
    if names.are_none:
        branches.directory.assert_own(branches.key)
    sessions = branches.directory.rows(branches.key).values("pk")
    item = SessionItem._base_manager.using(using).filter(pk=OuterRef("turn_item"))
    runs = AgentRun._base_manager.using(using).filter(session_id__in=sessions)
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
        name = names.showing(branch_id, opened_on, opened_at)
        if name is not None:
            yield _Row(name, *values, *([] if details else [{}]))


class _Names:
    """Which names the branches of a session have, and what the live ones show.

    One query for all branches; what each shows is looked up in its lineage.
    """

    def __init__(self, branches: Branches) -> None:
        rows = Branch._base_manager.using(branches.using).filter(
            session_id__in=branches.directory.rows(branches.key).values("pk")
        )
        columns = ("name", "archived_at")
        self._rows = {row.pk: row for row in rows.order_by("pk").only(*columns)}
        self._live = {
            row.name: row for row in self._rows.values() if row.archived_at is None
        }
        self._lineages = branches.lineages
        self._shown: dict[int, tuple[Segment, ...]] = {}

    @property
    def are_none(self) -> bool:
        """Return whether the session has no branch at all."""
        return not self._rows

    def of(self, branch_id: int | None) -> str:
        """Return the name that a branch has, or had before another took it."""
        row = self._rows.get(branch_id)
        return "" if row is None else row.name

    def showing(self, branch_id: int, opened_on: int, opened_at: int) -> str | None:
        """Name the branch that the usage of a turn counts for; None where none does.

        That is the run's own while it shows the turn's first item. Then it is the
        oldest that shows it, a fork or where the turn was restored; but what was used
        for an inherited turn goes to nobody else, who has that turn's own usage.
        """
        own = self.of(branch_id)
        if self._shows(own, opened_on, opened_at):
            return own
        if own != self.of(opened_on):
            return None
        shown = (live for live in self._live if self._shows(live, opened_on, opened_at))
        return next(shown, None)

    def _shows(self, name: str, opened_on: int, opened_at: int) -> bool:
        row = self._live.get(name)
        if row is None:
            return False
        if row.pk not in self._shown:
            self._shown[row.pk] = self._lineages.of(row.pk)
        return any(
            segment.branch_id == opened_on and segment.holds(opened_at)
            for segment in self._shown[row.pk]
        )


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
