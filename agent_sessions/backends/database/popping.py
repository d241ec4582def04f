"""Taking the newest item from a history."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Exists, F, OuterRef
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.directory import active
from agent_sessions.backends.keys import Asking, anything
from agent_sessions.items import Item, decode
from agent_sessions.items.kinds import is_opening
from agent_sessions.models import AgentSession, Branch, SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

Accept = Callable[[Item], bool]

# How many rows a pop looks at first; more only behind unreadable ones.
_WINDOW = 4


class _PassedOver(Exception):
    """The newest row is to stay, but it has been taken in this transaction."""


def pop_newest(
    engine: Engine, key: SessionKey, asking: Asking = anything
) -> Item | None:
    """Take the newest readable item that is accepted, in a transaction."""
    take = partial(_take, engine, key, asking)
    try:
        return engine.run(partial(take, at_once=True))
    except _PassedOver:
        return engine.run(partial(take, at_once=False))


def _take(
    engine: Engine,
    key: SessionKey,
    asking: Asking,
    connection: BaseDatabaseWrapper,
    *,
    at_once: bool,
) -> Item | None:
    held = engine.lock(connection, key)
    if held is None:
        return None
    accept = asking()
    statements = engine.statements
    if (
        at_once
        and key.branch is None
        and isinstance(statements, PostgreSQLStatements)
        and (text := statements.take_newest(connection, held)) is not None
    ):
        item = decode(text)
        if item is None or not accept(item):
            raise _PassedOver
        return item
    return _take_after_a_look(engine.branches(key, held), held.pk, accept)


def _take_after_a_look(
    branches: Branches,
    session: int,
    accept: Accept,
) -> Item | None:
    """Take the newest readable item from a session whose row is held.

    One that isn't accepted is passed over like an unreadable one.
    Unreadable rows are passed over and kept: a pop must not destroy what a repair
    or the right key could still read. What a branch has from its parent stays there:
    the branch then ends earlier.
    """
    branch = branches.current()
    if branch is None:
        return None
    columns = ("pk", "branch_id", "position", "turn", "data", "type", "role")
    children = Branch.objects.using(branches.using).filter(
        parent_id=OuterRef("branch_id"), fork_position__gte=OuterRef("position")
    )
    rows = branches.items(branch).order_by("-position")
    rows = rows.values_list(*columns, Exists(children))
    seen, window = 0, _WINDOW
    while True:
        found = list(rows[seen:window])
        for pk, owner, position, turn, data, kind, role, is_shared in found:
            item = decode(data)
            if item is None or not accept(item):
                continue
            opens = is_opening(kind, role)
            before = max(turn - 1, 0) if opens else turn
            if owner != branch.pk or is_shared:
                branches.replace(branch, position - 1, before)
            else:
                SessionItem._base_manager.using(branches.using).filter(pk=pk).delete()
                _uncount(branches.using, session)
                if opens:
                    own = Branch._base_manager.using(branches.using).filter(
                        pk=branch.pk
                    )
                    own.update(turn=before)
            return item
        if seen + len(found) < window:
            return None
        seen, window = window, window * 2


def _uncount(using: str, session: int) -> None:
    AgentSession.objects.using(using).filter(pk=session).update(
        item_count=F("item_count") - 1, **active(timezone.now())
    )
