"""What is done to stored histories through the ORM, off the hottest path."""

from __future__ import annotations

from django.db.models import Case, F, Value, When
from django.utils import timezone

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.directory import Directory
from agent_sessions.items import Item, StoredItem, decode
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem

# How many rows a pop looks at first; more only behind unreadable ones.
_POP_WINDOW = 4


def read_page(
    directory: Directory, key: SessionKey, before: int | None, limit: int
) -> Page:
    """Read a stretch of a history, oldest first, and whether more lies before it."""
    branch = directory.branches(key).values_list("pk", flat=True).first()
    if branch is None:
        directory.assert_own(key)
        return Page([], False)
    rows = SessionItem.objects.using(directory.using).filter(branch_id=branch)
    if before is not None:
        rows = rows.filter(position__lt=before)
    found = list(
        rows.order_by("-position").values_list(
            "position", "turn", "data", "created_at"
        )[: limit + 1]
    )
    items = [
        StoredItem(position, turn, decode(data), data, created_at)
        for position, turn, data, created_at in reversed(found[:limit])
    ]
    return Page(items, len(found) > limit)


def pop_newest(directory: Directory, key: SessionKey, session: int) -> Item | None:
    """Take the newest readable item from a session whose row is held.

    Unreadable rows are passed over and kept: a pop must not destroy what a repair
    or the right key could still read.
    """
    branch = directory.branches(key).values_list("pk", flat=True).first()
    if branch is None:
        directory.assert_own(key)
        return None
    rows = SessionItem.objects.using(directory.using).filter(branch_id=branch)
    seen, window = 0, _POP_WINDOW
    while True:
        found = list(
            rows.order_by("-position").values_list("pk", "data", "type", "role")[
                seen:window
            ]
        )
        for pk, data, kind, role in found:
            if (item := decode(data)) is not None:
                rows.filter(pk=pk).delete()
                _uncount(directory.using, session)
                if (kind, role) == ("message", "user"):
                    _reopen_turn(directory.using, branch)
                return item
        if seen + len(found) < window:
            return None
        seen, window = window, window * 2


def clear_history(using: str, session: int, *, keep_lease: bool) -> int:
    """Empty a session whose row is held; tell how many items it had.

    Branches' heads stay, so positions are never given twice. A run that is going
    on loses its lease, unless it is the one that clears: else its late writes would
    bring back a part of what was cleared. Open approvals are withdrawn.
    """
    branches = Branch.objects.using(using).filter(session_id=session)
    items = SessionItem.objects.using(using).filter(
        branch_id__in=list(branches.values_list("pk", flat=True))
    )
    count, _ = items.delete()
    current = AgentSession.objects.using(using).filter(pk=session)
    branches.exclude(pk__in=list(current.values_list("branch_id", flat=True))).delete()
    branches.update(turn=0, parent=None, fork_position=None)
    now = timezone.now()
    AgentRun.objects.using(using).filter(
        session_id=session, status=AgentRun.Status.WAITING
    ).update(status=AgentRun.Status.CANCELLED, finished_at=now, state="", interrupts="")
    current.update(item_count=0, title="", updated_at=now)
    if not keep_lease:
        current.update(
            fence=F("fence") + 1,
            run_id="",
            run_owner="",
            run_seen_at=None,
            state=AgentSession.State.IDLE,
        )
    return count


def _uncount(using: str, session: int) -> None:
    AgentSession.objects.using(using).filter(pk=session).update(
        item_count=F("item_count") - 1, updated_at=timezone.now()
    )


def _reopen_turn(using: str, branch: int) -> None:
    """Go back to the turn before, so that its number is given again."""
    Branch.objects.using(using).filter(pk=branch).update(
        turn=Case(When(turn__gt=0, then=F("turn") - 1), default=Value(0))
    )
