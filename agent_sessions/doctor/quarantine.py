"""Rows taken out of a history: on an archived branch of their own, until restored.

There is one such branch for each that lost rows, its parent, because positions are
unique within a branch only. No branch can be given a name with a ~; but what was
imported keeps its name, which may tell another branch's key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.utils import timezone

from agent_sessions.doctor.findings import Quarantined
from agent_sessions.models import AgentSession, Branch, SessionItem

PREFIX = "quarantine~"


def is_quarantine(branch: Branch) -> bool:
    """Return whether a branch is a quarantine."""
    return branch.archived_at is not None and branch.name.startswith(PREFIX)


def put_away(using: str, branch: Branch, pks: Iterable[Any]) -> None:
    """Move rows of a branch into its quarantine; the caller holds the session."""
    family = Branch._base_manager.using(using).filter(session_id=branch.session_id)
    children = family.filter(parent_id=branch.pk).order_by("pk")
    place = next(filter(is_quarantine, children), None)
    if place is None:
        place = family.create(
            session_id=branch.session_id,
            name=_free_name(family, f"{PREFIX}{branch.pk}"),
            # A fork before everything: nothing of the parent is shown or kept for it.
            parent_id=branch.pk,
            fork_position=0,
            archived_at=timezone.now(),
        )
    SessionItem._base_manager.using(using).filter(pk__in=list(pks)).update(branch=place)


def _free_name(family: Any, base: str) -> str:
    taken = set(family.values_list("name", flat=True))
    names = (base if n == 1 else f"{base}_{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def list_quarantined(using: str, row: AgentSession) -> list[Quarantined]:
    """List what a session has in quarantine."""
    found = quarantined(using, row.pk).order_by("branch__parent", "position")
    return [
        Quarantined(row.pk, row.session_id, name, position)
        for name, position in found.values_list("branch__parent__name", "position")
    ]


def quarantined(using: str, session: Any) -> Any:
    """Return the rows that a session has in quarantine."""
    return SessionItem._base_manager.using(using).filter(
        branch__session_id=session,
        branch__name__startswith=PREFIX,
        branch__archived_at__isnull=False,
    )
