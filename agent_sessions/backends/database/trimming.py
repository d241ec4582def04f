"""Remove the older turns of a history, in small steps that each leave whole turns.

A row goes where no branch that can be written to shows it within its last turns, and
it has nothing that belongs to a row that stays. Archived branches keep what is newer
than what their session lost. Then turns are counted anew from 1; positions stay.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from django.db.models import Count, F, Max, Min, Q, QuerySet

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Lineages, Segment, visible
from agent_sessions.backends.database.numbering import renumber
from agent_sessions.backends.database.removal import BATCH_SIZE, Guard, rest
from agent_sessions.exceptions import (
    InvalidBranch,
    SessionDoesNotExist,
    StorageError,
)
from agent_sessions.items import Item, decode, title_of
from agent_sessions.items.kinds import (
    CALL_OF,
    OPENING,
    Key,
    call_key,
    causes,
    own_key,
    type_and_role,
)
from agent_sessions.models import AgentSession, Branch, SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# How often somebody may make branches meanwhile before it is given up.
_ATTEMPTS = 5


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
            apply = partial(
                _remove,
                plan=plan,
                groups=step,
                guard=guard,
                is_first=number == 1,
                is_last=number == len(steps),
            )
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


def _remove(
    branches: Branches,
    plan: TurnPlan,
    groups: list[Group],
    guard: Guard,
    *,
    is_first: bool,
    is_last: bool,
) -> bool:
    """Remove a step's rows; return False where the branches are others by now."""
    sessions = AgentSession.objects.using(plan.using).filter(pk=plan.row.pk)
    row = sessions.first()
    if row is None:
        raise SessionDoesNotExist(plan.row.session_id)
    guard(row)
    if not plan.is_current():
        return False
    if is_first and (title := _new_title(plan, row)):
        sessions.update(title=title)
    items = SessionItem._base_manager.using(plan.using)
    count = sum(
        items.filter(group.rows, turn=group.turn).delete()[0] for group in groups
    )
    sessions.update(item_count=F("item_count") - count)
    if is_last:
        renumber(plan.using, row.pk)
    return True


def _new_title(plan: TurnPlan, row: AgentSession) -> str:
    """Return the first remaining message, where the title was drawn from the first."""
    if row.branch_id is None:
        return ""
    users = plan.view(row.branch_id).filter(**OPENING)
    texts = users.order_by("position").values_list("text", flat=True)
    if row.title != title_of(texts[:1]):
        return ""
    return title_of(texts.filter(position__gte=plan.cuts.get(row.branch_id, 0))[:1])


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one turn that a branch has of its own; `opens` has its message."""

    branch: int
    turn: int
    first: int
    last: int
    count: int
    opens: int

    @property
    def rows(self) -> Q:
        """The condition that finds the rows."""
        return Q(
            branch_id=self.branch, position__gte=self.first, position__lte=self.last
        )


class TurnPlan:
    """What goes and what stays of a session, as it was when it was read.

    `cuts` has, for each branch that loses something, the first position that it keeps.
    Raises InvalidBranch where turns are numbered wrongly.
    """

    def __init__(self, using: str, row: AgentSession, keep: int) -> None:
        self.using = using
        self.row = row
        self.cuts: dict[int, int] = {}
        self._branches = list(
            Branch._base_manager.using(using).filter(session_id=row.pk).order_by("pk")
        )
        self._state = self._read_state()
        self._own: dict[int, list[Group]] = {}
        self._gone: list[list[Group]] = []
        live = [branch for branch in self._branches if branch.archived_at is None]
        if any(branch.turn > keep for branch in live):
            # Lineages that others cached may be of a branch that is being made.
            self._lineages = Lineages(using)
            self._read_groups()
            self._choose(live, keep)

    @property
    def size(self) -> int:
        """How many items go."""
        return sum(group.count for family in self._gone for group in family)

    def is_current(self) -> bool:
        """Return whether the session still has the same branches."""
        return self._read_state() == self._state

    def view(self, branch: int) -> QuerySet[Any]:
        """Return the rows that a branch shows."""
        return visible(self.using, self._lineages.of(branch))

    def steps(self, size: int) -> list[list[Group]]:
        """Return what goes, the oldest first, about `size` rows at a time."""
        steps: list[list[Group]] = []
        room = 0
        for family in self._gone:
            count = sum(group.count for group in family)
            if count > room or not steps:
                steps.append([])
                room = size
            steps[-1] += family
            room -= count
        return steps

    # -- reading -------------------------------------------------------------------

    def _read_state(self) -> set[tuple[int, bool]]:
        branches = Branch._base_manager.using(self.using).filter(session_id=self.row.pk)
        return {
            (pk, archived is None)
            for pk, archived in branches.values_list("pk", "archived_at")
        }

    def _read_groups(self) -> None:
        for branch in self._branches:
            found = (
                SessionItem._base_manager.using(self.using)
                .filter(branch_id=branch.pk)
                .values_list("turn")
                .annotate(
                    first=Min("position"),
                    last=Max("position"),
                    count=Count("pk"),
                    opens=Count("pk", filter=Q(**OPENING)),
                )
                .order_by("first")
            )
            groups = [Group(branch.pk, *values) for values in found]
            if not branch.is_quarantine:
                _check_order(self.row, groups)
            self._own[branch.pk] = groups

    def _shown(self, branch: int) -> Iterator[Group]:
        """Return what a branch shows, the newest first."""
        for segment in self._lineages.of(branch):
            yield from reversed(self._seen(segment))

    def _seen(self, segment: Segment) -> list[Group]:
        groups = self._own.get(segment.branch_id, [])
        if segment.upto is None:
            return groups
        firsts = [group.first for group in groups]
        return groups[: bisect_right(firsts, segment.upto)]

    # -- choosing ------------------------------------------------------------------

    def _choose(self, live: list[Branch], keep: int) -> None:
        kept: set[Group] = set()
        shown: set[Group] = set()
        oldest: int | None = None
        for branch in live:
            groups = list(self._shown(branch.pk))
            shown.update(groups)
            last = _last_turns(groups, keep)
            if len(last) < len(groups):
                self.cuts[branch.pk] = last[-1].first
                last += self._needed(branch.pk, last)
            kept.update(last)
            begins = self.cuts.get(branch.pk, 0)
            oldest = begins if oldest is None else min(oldest, begins)
        everything = [group for groups in self._own.values() for group in groups]
        # What only archived branches have stays where it is newer than any loss.
        kept.update(
            group
            for group in everything
            if group not in shown and group.last >= (oldest or 0)
        )
        self._gone = [
            family for family in self._families(everything) if kept.isdisjoint(family)
        ]

    def _families(self, groups: list[Group]) -> list[list[Group]]:
        """Put together what is one turn of some branch: a fork may be in its middle."""
        roots = {group: group for group in groups}

        def root(group: Group) -> Group:
            while roots[group] is not group:
                group = roots[group]
            return group

        for branch in self._branches:
            own = self._own[branch.pk]
            if not own or branch.is_quarantine:
                continue
            inherited = self._lineages.of(branch.pk)[1:]
            seen = (found[-1] for each in inherited if (found := self._seen(each)))
            before = next(seen, None)
            if before is not None and before.turn == own[0].turn:
                roots[root(own[0])] = root(before)
        families: dict[Group, list[Group]] = defaultdict(list)
        for group in groups:
            families[root(group)].append(group)
        return sorted(families.values(), key=lambda family: family[0].first)

    def _needed(self, branch: int, last: list[Group]) -> list[Group]:
        """Find the older turns with calls whose outputs are among the last ones."""
        rows = self.view(branch)
        begins = last[-1].first
        older = rows.filter(position__lt=begins)
        by_place = {
            (group.branch, group.turn): group
            for group in self._shown(branch)
            if group.first < begins
        }
        found: list[Group] = []
        missing = _missing(_items(rows.filter(position__gte=begins)))
        while missing:
            key = missing.pop()
            place = _find(older, key)
            group = by_place.get(place) if place else None
            if group is None or group in found:
                continue
            found.append(group)
            missing |= _missing(_items(rows.filter(group.rows)))
        return found


def _check_order(row: AgentSession, groups: list[Group]) -> None:
    ends = accumulate((group.last for group in groups), max)
    turns = [group.turn for group in groups]
    overlaps = any(
        group.first <= end for group, end in zip(groups[1:], ends, strict=False)
    )
    if overlaps or turns != sorted(turns) or any(group.opens > 1 for group in groups):
        raise InvalidBranch(
            f"The turns of session {row.session_id!r} are numbered wrongly, so its "
            "last ones can't be told. Mend it with check_agent_sessions --repair."
        )


def _last_turns(groups: list[Group], keep: int) -> list[Group]:
    """Return the last `keep` turns of what a branch shows, newest first."""
    opened = 0
    for index, group in enumerate(groups):
        opened += group.opens
        if opened == keep and any(older.opens for older in groups[index + 1 :]):
            return groups[: index + 1]
    return list(groups)


def _items(rows: QuerySet[Any]) -> Iterator[Item]:
    for data in rows.order_by("position").values_list("data", flat=True).iterator():
        if (item := decode(data)) is not None:
            yield item


def _missing(items: Iterable[Item]) -> set[Key]:
    """Return the keys of what items can't be parted from and is not among them."""
    needed: set[Key] = set()
    own: set[Key] = set()
    for item in items:
        if type_and_role(item)[0] in CALL_OF:
            needed.add(call_key(item))
        else:
            own.add(own_key(item))
        needed.update(causes(item))
    return {(kind, name) for kind, name in needed - own if name}


def _find(older: QuerySet[Any], key: Key) -> tuple[int, int] | None:
    """Find the branch and turn of the newest call with a key."""
    kind, name = key
    calls = older.filter(type=kind).order_by("-position")
    if kind != "mcp_approval_request":
        # An approval's request is named by its id, which has no column.
        calls = calls.filter(call_id=(name or "")[:255])
    for branch, turn, data in calls.values_list("branch_id", "turn", "data").iterator():
        item = decode(data)
        if item is not None and own_key(item) == key:
            return branch, turn
    return None
