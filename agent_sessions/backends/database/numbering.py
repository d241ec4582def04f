"""Rows of a branch in pages, and the renumbering of their turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from django.db.models import Exists, F, OuterRef, QuerySet, Subquery

from agent_sessions.backends import run_rows
from agent_sessions.backends.database.lineage import Lineages, Segment, visible
from agent_sessions.items.kinds import OPENING, is_opening
from agent_sessions.models import Branch, SessionItem

BATCH_SIZE = 1000


def read_pages(
    rows: QuerySet[Any], columns: tuple[str, ...], size: int
) -> Iterator[list[Any]]:
    """Read rows of one branch in their order; `columns` begin with position.

    Each page is a query of its own: rows may be moved away between two of them.
    """
    after: int | None = None
    while True:
        page = rows if after is None else rows.filter(position__gt=after)
        found = list(page.order_by("position").values_list(*columns)[:size])
        if found:
            yield found
        if len(found) < size:
            return
        after = found[-1][0]


def shown_rows(using: str, branch: Branch) -> QuerySet[Any]:
    """Return a branch's own rows, without those before its fork."""
    rows = SessionItem._base_manager.using(using).filter(branch_id=branch.pk)
    return rows.filter(position__gt=branch.fork_position or 0)


def turns_before(using: str, inherited: tuple[Segment, ...]) -> int:
    """Count the user's messages that a branch has from its ancestors."""
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
        for page in read_pages(shown_rows(using, branch), columns, size):
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
