"""What is done to stored histories through the ORM, off the hottest path."""

from __future__ import annotations

from collections.abc import Callable

from django.db.models import Exists, F, OuterRef
from django.utils import timezone

from agent_sessions.backends.base import Page
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.directory import active, forget_history
from agent_sessions.items import Item, StoredItem, decode
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentSession,
    Branch,
    SessionItem,
)

# How many rows a pop looks at first; more only behind unreadable ones.
_POP_WINDOW = 4


def read_page(
    branches: Branches, *, before: int | None, after: int | None, limit: int
) -> Page:
    """Read a stretch of a history, oldest first, and whether more lies around it."""
    branch = branches.current()
    if branch is None:
        return Page([], False)
    rows = branches.items(branch)
    wanted = rows.values_list("position", "turn", "data", "created_at")
    if after is None:
        if before is not None:
            wanted = wanted.filter(position__lt=before)
        found = list(wanted.order_by("-position")[: limit + 1])
        has_earlier = len(found) > limit
        found = found[:limit][::-1]
        has_later = before is not None and rows.filter(position__gte=before).exists()
    else:
        wanted = wanted.filter(position__gt=after)
        found = list(wanted.order_by("position")[: limit + 1])
        has_later = len(found) > limit
        found = found[:limit]
        has_earlier = rows.filter(position__lte=after).exists()
    items = [
        StoredItem(position, turn, decode(data), data, created_at)
        for position, turn, data, created_at in found
    ]
    return Page(items, has_earlier, has_later)


def pop_newest(
    branches: Branches,
    session: int,
    accept: Callable[[Item], bool] = lambda item: True,
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
    seen, window = 0, _POP_WINDOW
    while True:
        found = list(rows[seen:window])
        for pk, owner, position, turn, data, kind, role, is_shared in found:
            item = decode(data)
            if item is None or not accept(item):
                continue
            opens = (kind, role) == ("message", "user")
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


def clear_history(using: str, session: int, *, keep_lease: bool) -> int:
    """Empty a session whose row is held; tell how many items it had.

    It goes on with its main branch. Branches' heads stay, so positions are never given
    twice, and so do their names: a stale session can't write into another's.
    """
    now = timezone.now()
    branches = Branch._base_manager.using(using).filter(session_id=session)
    items = SessionItem._base_manager.using(using).filter(
        branch_id__in=list(branches.values_list("pk", flat=True))
    )
    count, _ = items.delete()
    branches.exclude(name=MAIN_BRANCH).update(archived_at=now)
    branches.filter(name=MAIN_BRANCH).update(turn=0)
    forget_history(
        using,
        session,
        keep_lease=keep_lease,
        branch=branches.filter(name=MAIN_BRANCH).first(),
    )
    return count


def _uncount(using: str, session: int) -> None:
    AgentSession.objects.using(using).filter(pk=session).update(
        item_count=F("item_count") - 1, **active(timezone.now())
    )
