"""Remove the older turns of a history, in small steps that each leave whole turns.

A row goes where no branch that can be written to shows it within its last turns, and
it has nothing that belongs to a row that stays. Archived branches keep what is newer
than what their session lost. Then turns are counted anew from 1; positions stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.db.models import F

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.removal import BATCH_SIZE, Guard, rest
from agent_sessions.backends.database.turnplan import Group, TurnPlan
from agent_sessions.exceptions import SessionDoesNotExist, StorageError
from agent_sessions.items import first_line
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

    pass

# How often somebody may make branches meanwhile before it is given up.
_ATTEMPTS = 5
_CHUNK = 500


def count_older(engine: Engine, key: SessionKey, keep: int) -> int:
    """Return how many items trim_history() would remove."""
    return engine.ask(key, lambda branches: _plan(branches, keep).size)


def trim_history(
    engine: Engine,
    key: SessionKey,
    keep: int,
    *,
    guard: Guard,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Remove what is older than the last `keep` turns of each branch.

    Tells how many items. Each step is a transaction of about `batch_size` rows, but
    never of less than a turn; who is killed in between is gone on with by the next
    call. `guard` is given the session's row in each and raises where it must stay.
    Raises InvalidBranch where turns are numbered wrongly.
    """
    removed = 0
    for _ in range(_ATTEMPTS):
        plan: TurnPlan = engine.ask(key, lambda branches: _plan(branches, keep))
        steps = plan.steps(batch_size)
        for number, step in enumerate(steps, 1):
            began = time.monotonic()
            apply = _Step(plan, step, number == 1, number == len(steps), guard)
            if not engine.change(key, apply):
                break
            rest(engine.using, began)
            removed += sum(group.count for group in step)
        else:
            return removed
    raise StorageError(
        "Somebody makes branches of the session all the time. Its older turns are "
        "partly removed; try again later."
    )


def _plan(branches: Branches, keep: int) -> TurnPlan:
    row = branches.directory.rows(branches.key).first()
    if row is None:
        raise SessionDoesNotExist(branches.key.session_id)
    return TurnPlan(branches.using, row, keep)


class _Step:
    """One transaction of trim_history(), while the session's row is held."""

    def __init__(
        self,
        plan: TurnPlan,
        groups: list[Group],
        is_first: bool,
        is_last: bool,
        guard: Guard,
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.is_first = is_first
        self.is_last = is_last
        self.guard = guard
        self.using = plan.using
        self.items = SessionItem._base_manager.using(plan.using)
        self.sessions = AgentSession.objects.using(plan.using).filter(pk=plan.row.pk)

    def __call__(self, branches: Branches) -> bool:
        """Remove the step's rows; False where the branches are others by now."""
        row = self.sessions.first()
        if row is None:
            raise SessionDoesNotExist(self.plan.row.session_id)
        self.guard(row)
        if not self.plan.is_current():
            return False
        if self.is_first:
            self._retitle(row)
        count = 0
        for group in self.groups:
            rows = self.items.filter(
                branch_id=group.branch,
                position__gte=group.first,
                position__lte=group.last,
            )
            count += rows.filter(turn=group.turn).delete()[0]
        self.sessions.update(item_count=F("item_count") - count)
        if self.is_last:
            self._renumber()
        return True

    def _retitle(self, row: AgentSession) -> None:
        """Rebuild the title from the first remaining message."""
        if row.branch_id is None:
            return
        users = self.plan.view(row.branch_id).filter(**OPENING)
        texts = users.order_by("position").values_list("position", "text")
        first = texts.first()
        if first is None or row.title != first_line(first[1]):
            return
        kept = texts.filter(position__gte=self.plan.cuts.get(row.branch_id, 0)).first()
        if kept is not None:
            self.sessions.update(title=first_line(kept[1]))

    def _renumber(self) -> None:
        """Count the turns of what is left anew, also those that runs name."""
        for branch, first, last, by in self.plan.shifts():
            rows = self.items.filter(branch_id=branch, position__gte=first)
            if last is not None:
                rows = rows.filter(position__lte=last)
            rows.update(turn=F("turn") - by)
        for pk, by in self.plan.branch_shifts():
            Branch._base_manager.using(self.using).filter(pk=pk, turn__gte=by).update(
                turn=F("turn") - by
            )
        openers = self.items.filter(branch__session_id=self.plan.row.pk, **OPENING)
        turns = dict(openers.values_list("pk", "turn"))
        runs = AgentRun._base_manager.using(self.using).filter(
            session_id=self.plan.row.pk
        )
        _in_chunks(list(turns), lambda pks: _renumber_runs(runs, turns, pks))


def _renumber_runs(runs: Any, turns: dict[int, int], openers: list[int]) -> None:
    found = runs.filter(turn_item__in=openers).values_list("pk", "turn_item", "turn")
    for pk, opener, turn in list(found):
        if turn != turns[opener]:
            run_rows.write(runs.filter(pk=pk), turn=turns[opener])


def _in_chunks(values: list[int], act: Callable[[list[int]], None]) -> None:
    for start in range(0, len(values), _CHUNK):
        act(values[start : start + _CHUNK])
