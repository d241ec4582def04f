"""Put a summary in the place of a history's tail, in one step, and keep the originals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from django.db import connections
from django.db.models import F
from django.utils import timezone

from agent_sessions.backends.database.answers import Place
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.vendors import statements_for
from agent_sessions.backends.directory import active
from agent_sessions.items import Batch, Item, decode
from agent_sessions.items.kinds import is_opening
from agent_sessions.models import Branch

_COLUMNS = ("position", "turn", "type", "role", "data")


@dataclass(frozen=True, slots=True)
class Tail:
    """The newest rows of a branch after the last unreadable one, oldest first.

    `complete` says that there is nothing before them.
    """

    branch_id: int
    rows: tuple[tuple[int, int, str, str, str], ...]
    items: tuple[Item, ...]
    complete: bool


def read_tail(branches: Branches, limit: int) -> Tail | None:
    """Read up to `limit` rows; None where the session has no branch yet."""
    branch = branches.current()
    if branch is None:
        return None
    found = _newest(branches, branch, limit + 1)
    read = [(row, decode(row[-1])) for row in found[:limit]]
    tail = list(takewhile(lambda each: each[1] is not None, read))[::-1]
    return Tail(
        branch.pk,
        tuple(row for row, _ in tail),
        tuple(item for _, item in tail if item is not None),
        complete=len(tail) == len(found),
    )


def swap_tail(branches: Branches, tail: Tail, start: int, batch: Batch) -> bool:
    """Replace the rows of a tail from `start` on; False where they have moved.

    The originals stay on an archived branch, which restore() brings back.
    """
    expected = tail.rows[start:]
    branch = branches.current()
    if not expected or branch is None or branch.pk != tail.branch_id:
        return False
    if tuple(reversed(_newest(branches, branch, len(expected)))) != expected:
        return False
    position, turn, kind, role, _ = expected[0]
    opens = is_opening(kind, role)
    before = turn - 1 if opens and turn else turn
    _append(branches, branches.replace(branch, position - 1, before), batch)
    return True


def swap_all(branches: Branches, batch: Batch) -> bool:
    """Replace the whole history; the originals stay on an archived branch."""
    branch = branches.current()
    if branch is None:
        return False
    _append(branches, branches.replace(branch, 0, 0), batch)
    return True


def _newest(
    branches: Branches, branch: Branch, limit: int
) -> Sequence[tuple[int, int, str, str, str]]:
    rows = branches.items(branch).order_by("-position")
    return list(rows.values_list(*_COLUMNS)[:limit])


def _append(branches: Branches, branch: Branch, batch: Batch) -> None:
    connection = connections[branches.using]
    statements = statements_for(connection, branches.directory.alias)
    now = timezone.now()
    with connection.cursor() as cursor:
        statements.insert(
            cursor, Place(branch.pk, branch.head, branch.turn), batch, now
        )
    Branch._base_manager.using(branches.using).filter(pk=branch.pk).update(
        head=F("head") + len(batch), turn=F("turn") + batch.turns
    )
    branches.directory.rows(branches.key).update(
        item_count=F("item_count") + len(batch), **active(now)
    )
