"""Put items in the places of others: a summary for many, or a new text for one.

A summary goes on a new branch, and the originals stay on the archived one. A rewritten
text takes its row: position, turn and time stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from django.db import connections
from django.db.models import F, Max, QuerySet
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.pace import Pace
from agent_sessions.backends.database.sql import statements_for
from agent_sessions.backends.database.sql.base import Place
from agent_sessions.backends.directory import active
from agent_sessions.items import Batch, Item, decode, encode_batch
from agent_sessions.items.kinds import is_opening
from agent_sessions.models import Branch, SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

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


def rewrite(
    engine: Engine,
    key: SessionKey,
    change: Callable[[Item], Item | None],
    *,
    unless: str,
    batch_size: int,
) -> int:
    """Rewrite a session's items in short transactions; return how many have changed.

    Those of all branches, archived ones too. `change` returns None for what stays. Each
    row is compared with what was read, so what another process did meanwhile is left
    alone. Rows that hold `unless` are left out.
    """
    items = SessionItem._base_manager.using(engine.using)
    rows = items.filter(branch__session=engine.directory.pk_of(key))
    if unless:
        rows = rows.exclude(data__contains=unless)
    last = rows.aggregate(last=Max("pk"))["last"] or 0
    after, changed, pace = 0, 0, Pace(engine.using, batch_size)
    while after < last:
        page = rows.filter(pk__gt=after).order_by("pk").values_list("pk", "data")
        found = list(page[: pace.size])
        if not found:
            break
        after = found[-1][0]
        new = [
            (items.filter(pk=pk, data=data), text)
            for pk, data in found
            if (text := _rewritten(data, change)) is not None
        ]
        changed += engine.atomically(pace.timed(partial(_write, new)))
        pace.rest()
    return changed


def _rewritten(data: str, change: Callable[[Item], Item | None]) -> str | None:
    item = decode(data)
    changed = None if item is None else change(item)
    return None if changed is None else encode_batch([changed]).rows[0].data


def _write(new: list[tuple[QuerySet[SessionItem], str]]) -> int:
    return sum(row.update(data=text, size=len(text)) for row, text in new)
