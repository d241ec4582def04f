"""Rows taken out of a history: on an archived branch of their own, until restored.

There is one such branch for each that lost rows, its parent, because positions are
unique within a branch only.
"""

from __future__ import annotations

from typing import Any

from django.utils import timezone

from agent_sessions.backends.database.branches import next_version
from agent_sessions.doctor.findings import Quarantined
from agent_sessions.models import AgentSession, Branch, SessionItem


def put_away(using: str, branch: Branch, pk: Any) -> None:
    """Move a row of a branch into its quarantine; the caller holds the session."""
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
    SessionItem._base_manager.using(using).filter(pk=pk).update(branch=place)


def list_quarantined(using: str, row: AgentSession) -> list[Quarantined]:
    """List what a session has in quarantine."""
    found = _quarantined(using, row.pk).order_by("branch__parent", "position")
    return [
        Quarantined(row.pk, row.session_id, item.branch.parent.label, item.position)
        for item in found.select_related("branch__parent").only(
            "position", "branch__parent__name", "branch__parent__version"
        )
    ]


def _quarantined(using: str, session: Any) -> Any:
    """Return the rows that a session has in quarantine."""
    return SessionItem._base_manager.using(using).filter(
        branch__session_id=session, branch__is_quarantine=True
    )


def take_back(
    using: str, session: AgentSession, position: int, branch: str | None
) -> None:
    """Move a row back to the branch that lost it; see restore()."""
    rows = _quarantined(using, session.pk).filter(position=position)
    if branch is not None:
        homes = Branch._base_manager.using(using).filter(**Branch.of_label(branch))
        rows = rows.filter(branch__parent__in=homes.filter(session_id=session.pk))
    found = list(rows.values_list("pk", "branch__parent_id")[:2])
    if not found:
        raise SessionItem.DoesNotExist(
            f"The session has no quarantined row of position {position}. "
            "examine() lists those it has."
        )
    if len(found) > 1:
        raise SessionItem.MultipleObjectsReturned(
            f"Several branches lost a row of position {position}: name the branch."
        )
    ((pk, home),) = found
    SessionItem._base_manager.using(using).filter(pk=pk).update(branch_id=home)
