"""What runs have used: rows of AgentRun, and the session's sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from django.db.models import F, Max, Min, Q

from agent_sessions.backends import run_rows
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.transfer.export import TOKENS
from agent_sessions.transfer.import_.records import SourceRun
from agent_sessions.transfer.import_.target import Target


def write_runs(target: Target) -> int:
    """Write a session's runs that are new or have changed; tell how many."""
    session = target.session
    if not session.runs:
        return 0
    target.hold()
    row = target.row
    if row is None:
        return len(session.runs)
    runs: Any = AgentRun._base_manager.using(target.using).filter(session_id=row.pk)
    known = {run.run_id: run for run in runs}
    places = _Places(target)
    added = dict.fromkeys(TOKENS, 0)
    new, changed = [], []
    for source in session.runs:
        columns = source.columns | places.columns(source)
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
        run_rows.copy(target.using, new)
        for run, columns in changed:
            run_rows.write(runs.filter(pk=run.pk), **columns)
        if new or changed:
            AgentSession.objects.using(target.using).filter(pk=row.pk).update(
                **{name: F(name) + value for name, value in added.items()}
            )
    return len(new) + len(changed)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Where a turn lies: its items, and the user message that opens it."""

    number: int
    first: int
    last: int
    opening: int | None


class _Places:
    """Finds the turns that a session's runs were about, in what was imported."""

    def __init__(self, target: Target) -> None:
        self.branches = {
            name: line.branch for name, line in target.lines.items() if line.branch
        }
        self.items = SessionItem._base_manager.using(target.using)
        runs = target.session.runs
        self._by_number = (
            self._read_numbered() if any(run.turn is not None for run in runs) else {}
        )
        self._by_opening = self._read_openings(run.opening for run in runs)

    def columns(self, run: SourceRun) -> dict[str, Any]:
        """Return the columns that say which items and turn a run was about."""
        branch = self.branches.get(run.branch)
        if branch is None:
            return {}
        columns: dict[str, Any] = {"branch_id": branch.pk}
        if run.opening in self._by_opening:
            item, turn = self._by_opening[run.opening]
            return columns | {"turn": turn, "turn_item": item}
        if run.turn is None:
            return columns
        found = self._by_number.get((branch.pk, run.turn))
        if found is None:
            return columns
        return columns | {
            "first_position": found.first,
            "last_position": found.last,
            "turn": found.number,
            "turn_item": found.opening,
        }

    def _read_numbered(self) -> dict[tuple[int, int], _Turn]:
        is_opening = Q(**OPENING)
        rows = (
            self.items.filter(
                branch_id__in=[branch.pk for branch in self.branches.values()]
            )
            .values_list("branch_id", "turn")
            .annotate(
                first=Min("position"),
                last=Max("position"),
                opening=Min("pk", filter=is_opening),
            )
            .order_by()
        )
        return {
            (branch, number): _Turn(number, first, last, opening)
            for branch, number, first, last, opening in rows
        }

    def _read_openings(
        self, openings: Iterable[tuple[str, int] | None]
    ) -> dict[tuple[str, int] | None, tuple[int, int]]:
        """Find each opening's key and turn, asking for a few hundred at a time."""
        positions: dict[str, set[int]] = {}
        for opening in openings:
            if opening is not None and opening[0] in self.branches:
                positions.setdefault(opening[0], set()).add(opening[1])
        found: dict[tuple[str, int] | None, tuple[int, int]] = {}
        for name, wanted in positions.items():
            rows = self.items.filter(branch=self.branches[name])
            for some in _chunks(sorted(wanted), 200):
                for position, pk, turn in rows.filter(
                    position__in=some, **OPENING
                ).values_list("position", "pk", "turn"):
                    found[name, position] = pk, turn
        return found


def _chunks(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _same(run: AgentRun, columns: dict[str, Any]) -> bool:
    return all(getattr(run, name) == value for name, value in columns.items())
