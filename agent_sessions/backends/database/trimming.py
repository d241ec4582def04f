"""Remove the older turns of a history, in small steps that each leave whole turns.

A row goes where no branch that can be written to shows it within its last turns, and
it has nothing that belongs to a row that stays. Archived branches keep what is newer
than what their session lost. Then turns are counted anew from 1; positions stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from django.db.models import Count, F, Max, Min, Q, QuerySet

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Lineages, renumber, visible
from agent_sessions.backends.database.pace import Pace
from agent_sessions.backends.database.removal import BATCH_SIZE, Guard
from agent_sessions.exceptions import InvalidBranch, SessionDoesNotExist, StorageError
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
# So many messages are looked through for one that shows words.
_LOOKED = 100


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
    removed, pace = 0, Pace(engine.using, batch_size)
    for _ in range(_ATTEMPTS):
        plan: TurnPlan = engine.ask(key, lambda branches: _plan(branches, keep))
        for step in plan.steps(pace):
            apply = partial(_remove, plan=plan, step=step, guard=guard)
            if not engine.change(key, pace.timed(apply)):
                break
            pace.rest()
            removed += step.size
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


def _remove(branches: Branches, plan: TurnPlan, step: Step, guard: Guard) -> bool:
    """Remove a step's rows; return False where the branches are others by now."""
    sessions = AgentSession.objects.using(plan.using).filter(pk=plan.row.pk)
    row = sessions.first()
    if row is None:
        raise SessionDoesNotExist(plan.row.session_id)
    guard(row)
    if not plan.is_current():
        return False
    if step.is_first and (title := _new_title(plan, row)):
        sessions.update(title=title)
    items = SessionItem._base_manager.using(plan.using)
    count = sum(
        items.filter(group.rows, turn=group.turn).delete()[0] for group in step.groups
    )
    sessions.update(item_count=F("item_count") - count)
    if step.is_last:
        renumber(plan.using, row.pk)
    return True


def _new_title(plan: TurnPlan, row: AgentSession) -> str:
    """Return a title of what remains, where the one there is was drawn from the first.

    That is a message of the oldest branch, where the first one was edited.
    """
    if row.branch_id is None or not row.title:
        return ""
    texts, oldest = plan.texts(row.branch_id), plan.texts(plan.root_of(row.branch_id))
    if row.title not in {title_of(texts[:_LOOKED]), title_of(oldest[:_LOOKED])}:
        return ""
    first = plan.begins.get(row.branch_id, 0)
    return title_of(texts.filter(turn__gte=first)[:_LOOKED])


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
        return Q(
            branch_id=self.branch, position__gte=self.first, position__lte=self.last
        )


@dataclass(slots=True)
class Step:
    """What goes in one transaction."""

    groups: list[Group]
    is_first: bool = False
    is_last: bool = False

    @property
    def size(self) -> int:
        return _size(self.groups)


class TurnPlan:
    """What goes and what stays of a session, as it was when it was read.

    `begins` has, for each branch that can be written to, the first turn of its last
    ones, and 0 where it keeps all. Raises InvalidBranch where turns are numbered wrongly.
    """

    def __init__(self, using: str, row: AgentSession, keep: int) -> None:
        self.using = using
        self.row = row
        branches = Branch._base_manager.using(using).filter(session_id=row.pk)
        self._branches = list(branches.order_by("pk"))
        self._state = self._read_state()
        self._lineages = Lineages(using)
        self.begins: dict[int, int] = {
            branch.pk: branch.turn - keep + 1 if branch.turn > keep else 0
            for branch in self._branches
            if branch.archived_at is None
        }
        # What goes, the oldest turns first.
        self._gone: list[Group] = []
        if any(self.begins.values()):
            self._own = self._read_groups()
            everything = {group for own in self._own.values() for group in own}
            gone = everything - self._kept(everything)
            self._gone = sorted(gone, key=lambda group: (group.turn, group.branch))

    @property
    def size(self) -> int:
        return _size(self._gone)

    def is_current(self) -> bool:
        return self._read_state() == self._state

    def view(self, branch: int) -> QuerySet[Any]:
        return visible(self.using, self._lineages.of(branch))

    def texts(self, branch: int) -> QuerySet[Any]:
        """Return what the messages of the user say, the oldest first."""
        users = self.view(branch).filter(**OPENING).order_by("position")
        return users.values_list("text", flat=True)

    def root_of(self, branch: int) -> int:
        return self._lineages.of(branch)[-1].branch_id

    def steps(self, pace: Pace) -> Iterator[Step]:
        """Return what goes in one transaction each: turns whole in all branches."""
        turns = [list(turn) for _, turn in groupby(self._gone, key=lambda g: g.turn)]
        step = Step([], is_first=True)
        for number, turn in enumerate(turns, 1):
            step.groups += turn
            step.is_last = number == len(turns)
            if step.is_last or step.size + _size(turns[number]) > pace.size:
                yield step
                step = Step([])

    def _read_state(self) -> set[tuple[int, bool]]:
        branches = Branch._base_manager.using(self.using).filter(session_id=self.row.pk)
        return {
            (pk, archived is None)
            for pk, archived in branches.values_list("pk", "archived_at")
        }

    def _read_groups(self) -> dict[int, list[Group]]:
        own: dict[int, list[Group]] = {}
        for branch in self._branches:
            rows = SessionItem._base_manager.using(self.using).filter(
                branch_id=branch.pk
            )
            found = rows.values_list("branch_id", "turn").annotate(
                first=Min("position"),
                last=Max("position"),
                count=Count("pk"),
                opens=Count("pk", filter=Q(**OPENING)),
            )
            own[branch.pk] = [Group(*values) for values in found.order_by("first")]
            if not branch.is_quarantine:
                _check_order(self.row, own[branch.pk])
        return own

    def _shown(self, branch: int) -> set[Group]:
        return {
            group
            for segment in self._lineages.of(branch)
            for group in self._own.get(segment.branch_id, ())
            if segment.upto is None or group.first <= segment.upto
        }

    def _kept(self, everything: set[Group]) -> set[Group]:
        shown = {branch: self._shown(branch) for branch in self.begins}
        kept: set[Group] = set()
        for branch, groups in shown.items():
            last = self.begins[branch]
            turns = self._needed(branch, last) if last else set[int]()
            kept |= {
                group for group in groups if group.turn >= last or group.turn in turns
            }
        # What only archived branches have stays where it is newer than any loss.
        oldest = min(self.begins.values())
        unseen = everything.difference(*shown.values())
        kept |= {group for group in unseen if group.turn >= oldest}
        # A fork may be in the middle of a turn, which is on both sides of it.
        for branch in self._branches:
            own = self._own[branch.pk]
            if branch.parent_id and own and not own[0].opens:
                same = {
                    group
                    for group in self._shown(branch.pk)
                    if group.turn == own[0].turn
                }
                kept |= same if same & kept else set()
        return kept

    def _needed(self, branch: int, last: int) -> set[int]:
        """Find the older turns with calls whose outputs are among the last ones."""
        rows = self.view(branch)
        older = rows.filter(turn__lt=last)
        found: set[int] = set()
        missing = _missing(_items(rows.filter(turn__gte=last)))
        while missing:
            turn = _find(older, missing.pop())
            if turn is not None and turn not in found:
                found.add(turn)
                missing |= _missing(_items(rows.filter(turn=turn)))
        return found


def _size(groups: Iterable[Group]) -> int:
    return sum(group.count for group in groups)


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


def _find(older: QuerySet[Any], key: Key) -> int | None:
    """Find the turn of the newest call with a key."""
    kind, name = key
    calls = older.filter(type=kind).order_by("-position")
    if kind != "mcp_approval_request":
        # An approval's request is named by its id, which has no column.
        calls = calls.filter(call_id=(name or "")[:255])
    for turn, data in calls.values_list("turn", "data").iterator():
        item = decode(data)
        if item is not None and own_key(item) == key:
            return int(turn)
    return None
