"""Which rows a branch shows: its own, and its ancestors' up to each fork.

And the turns of these rows: found, and counted anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from django.db import connections
from django.db.models import Exists, F, Max, OuterRef, Q, QuerySet, Subquery

from agent_sessions.backends import run_rows
from agent_sessions.items.kinds import OPENING, is_opening
from agent_sessions.models import Branch, SessionItem

BATCH_SIZE = 1000
# So many positions are read through rather than searched.
_NEAR = 128
# What a column of positions holds.
_LAST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one branch that are seen: positions over `after`, up to `upto`.

    `upto` None is open: the branch itself, which grows.
    """

    branch_id: int
    after: int
    upto: int | None = None

    def holds(self, position: int) -> bool:
        return self.after < position and (self.upto is None or position <= self.upto)


# A branch's parent and the position it forks at, by its id.
Family = dict[int, tuple[int | None, int | None]]


class Lineages:
    """The lineages of branches, read once in one operation.

    They are not kept any longer: a restored backup gives the ids of branches to other
    branches, of other people's sessions, while the process goes on.
    """

    def __init__(self, using: str) -> None:
        self.using = using
        self._families: Family = {}

    def of(self, branch_id: int) -> tuple[Segment, ...]:
        if branch_id not in self._families:
            branches = Branch._base_manager.using(self.using)
            session = branches.filter(pk=branch_id).values("session_id")[:1]
            rows = branches.filter(session_id=Subquery(session))
            self._families |= family(
                rows.values_list("pk", "parent_id", "fork_position")
            )
        return walk(self._families, branch_id)


def family(rows: Iterable[Sequence[Any]]) -> Family:
    """Return the branches of a session by id, from rows of id, parent and fork."""
    return {pk: (parent, fork) for pk, parent, fork in rows}


def walk(branches: Family, branch_id: int) -> tuple[Segment, ...]:
    segments: dict[int, Segment] = {}
    current: int | None = branch_id
    upto: int | None = None
    # A branch that a broken row makes its own ancestor ends the walk.
    while current is not None and current in branches and current not in segments:
        parent, fork = branches[current]
        segments[current] = Segment(current, fork or 0, upto)
        current, upto = parent, fork
    return tuple(segments.values())


def visible(
    using: str, segments: tuple[Segment, ...], *, after: int = 0, upto: int = _LAST
) -> QuerySet[Any]:
    """Return the rows of segments, between two positions.

    Each bound is in the query once: of two, SQLite may begin to read at the lower one.
    """
    shown = Q()
    for segment in segments:
        part = Q(branch_id=segment.branch_id, position__gt=max(segment.after, after))
        last = upto if segment.upto is None else min(segment.upto, upto)
        if last != _LAST:
            part &= Q(position__lte=last)
        shown |= part
    return SessionItem._base_manager.using(using).filter(shown)


def ended_in(segments: tuple[Segment, ...], *, upto: int = _LAST) -> Q:
    """Match the runs whose last item is in segments, up to a position."""
    ended = Q()
    for segment in segments:
        last = upto if segment.upto is None else min(segment.upto, upto)
        ended |= Q(
            branch_id=segment.branch_id,
            last_position__gt=segment.after,
            last_position__lte=last,
        )
    return ended


def segment_of(segments: tuple[Segment, ...], position: int) -> Segment:
    """Find the segment that a fork after `position` grows from.

    Before everything it is the oldest one, the root.
    """
    for segment in segments:
        if segment.holds(position):
            return segment
    return segments[-1]


# -- turns -----------------------------------------------------------------------------


def first_of_turn(using: str, segments: tuple[Segment, ...], turn: int) -> int | None:
    """Find the position of the user message that begins a turn.

    Turns grow with positions, so halving what is left finds it: no index over turns is
    needed, which every append would pay for.
    """
    table = connections[using].ops.quote_name(SessionItem._meta.db_table)
    probe = (
        f"SELECT turn FROM {table} WHERE branch_id = %s AND position >= %s "  # noqa: S608 - no input
        "ORDER BY position LIMIT 1"
    )
    for segment in reversed(segments):
        rows = visible(using, (segment,))
        last = rows.aggregate(last=Max("position"))["last"] or 0
        places = range(segment.after + 1, last + 1, _NEAR)
        with connections[using].cursor() as cursor:

            def turn_at(position: int, cursor: Any = cursor, at: Any = segment) -> Any:
                # A query set takes several times as long.
                cursor.execute(probe, [at.branch_id, position])
                return cursor.fetchone()[0]

            begin = bisect_left(places, turn, key=turn_at) - 1
        if begin > 0:
            # With both bounds SQLite may begin to read at the lower one.
            rows = visible(using, (replace(segment, after=places[begin] - 1),))
        near = rows.filter(turn__gte=turn).order_by("position")
        found = near.values_list("position", "turn", "type", "role").first()
        position, number, kind, role = found or (0, 0, "", "")
        if number == turn and is_opening(kind, role):
            return int(position)
    return None


def read_pages(
    rows: QuerySet[Any], columns: tuple[str, ...], size: int, after: int | None = None
) -> Iterator[list[Any]]:
    """Read rows of one branch in their order; `columns` begin with position.

    Each page is a query of its own: rows may be moved away between two of them. `rows`
    have no lower bound beside `after`, see visible().
    """
    while True:
        page = rows if after is None else rows.filter(position__gt=after)
        found = list(page.order_by("position").values_list(*columns)[:size])
        if found:
            yield found
        if len(found) < size:
            return
        after = found[-1][0]


def read_own(
    using: str, branch: Branch, columns: tuple[str, ...], size: int
) -> Iterator[list[Any]]:
    """Read a branch's own rows, without those before its fork, as read_pages() does."""
    rows = SessionItem._base_manager.using(using).filter(branch_id=branch.pk)
    return read_pages(rows, columns, size, branch.fork_position or 0)


def turns_before(using: str, inherited: tuple[Segment, ...]) -> int:
    if not inherited:
        return 0
    count: int = visible(using, inherited).filter(**OPENING).count()
    return count


def renumber(using: str, session: Any, size: int = BATCH_SIZE) -> None:
    """Renumber the turns of a session's rows by its user messages."""
    lineages = Lineages(using)
    branches = Branch._base_manager.using(using).filter(session_id=session)
    for branch in branches.order_by("pk"):
        if branch.is_quarantine:
            continue
        turn = turns_before(using, lineages.of(branch.pk)[1:])
        columns = ("position", "pk", "turn", "type", "role")
        for page in read_own(using, branch, columns, size):
            moved: dict[int, list[Any]] = defaultdict(list)
            for _, pk, stored, kind, role in page:
                turn += is_opening(kind, role)
                if stored != turn:
                    moved[turn - stored].append(pk)
            for by, pks in moved.items():
                _move(using, by, pks)
        branches.filter(pk=branch.pk).exclude(turn=turn).update(turn=turn)
    # Runs tell the turn by the message that opens it.
    items = SessionItem._base_manager.using(using).filter(branch__session_id=session)
    opening = items.filter(pk=OuterRef("turn_item"))
    runs = run_rows.runs_of(using, session).filter(Exists(opening))
    run_rows.write(runs, turn=Subquery(opening.values("turn")[:1]))


def _move(using: str, by: int, pks: list[Any]) -> None:
    SessionItem._base_manager.using(using).filter(pk__in=pks).update(
        turn=F("turn") + by
    )
