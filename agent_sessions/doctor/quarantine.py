"""Rows taken out of a history: on an archived branch of their own, until restored.

There is one such branch for each that lost rows, its parent, because positions are
unique within a branch only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.utils import timezone

from agent_sessions.backends.database.branches import next_version
from agent_sessions.doctor.findings import Quarantined
from agent_sessions.models import AgentSession, Branch, SessionItem


def put_away(using: str, branch: Branch, pks: Iterable[Any]) -> None:
    """Move rows of a branch into its quarantine; the caller holds the session."""
    family = Branch._base_manager.using(using).filter(session_id=branch.session_id)
    place = family.filter(parent_id=branch.pk, is_quarantine=True).first()
    if place is None:
        place = family.create(
            session_id=branch.session_id,
            name=branch.name,
            version=next_version(branch),
            # A fork before everything: nothing of the parent is shown or kept for it.
            parent_id=branch.pk,
            fork_position=0,
            archived_at=timezone.now(),
            is_quarantine=True,
        )
    SessionItem._base_manager.using(using).filter(pk__in=list(pks)).update(branch=place)


def list_quarantined(using: str, row: AgentSession) -> list[Quarantined]:
    """List what a session has in quarantine."""
    found = quarantined(using, row.pk).order_by("branch__parent", "position")
    return [
        Quarantined(row.pk, row.session_id, item.branch.parent.label, item.position)
        for item in found.select_related("branch__parent").only(
            "position", "branch__parent__name", "branch__parent__version"
        )
    ]


def quarantined(using: str, session: Any) -> Any:
    """Return the rows that a session has in quarantine."""
    return SessionItem._base_manager.using(using).filter(
        branch__session_id=session, branch__is_quarantine=True
    )
