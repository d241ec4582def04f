"""Rows back from the quarantine."""

from __future__ import annotations

from typing import Any

from django.db.models import Count

from agent_sessions.backends.base import SessionKey
from agent_sessions.doctor.examining import backend_of
from agent_sessions.doctor.quarantine import quarantined
from agent_sessions.doctor.turns import renumber
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.reports import guarded


@guarded
def restore(session: AgentSession, position: int, *, branch: str | None = None) -> None:
    """Move a row from the quarantine back to where it was.

    `branch` names the branch that it was on, where several lost a row of that
    position. Raises SessionItem.DoesNotExist and MultipleObjectsReturned.
    """
    backend = backend_of(session)
    using = backend.using

    def move(_: Any) -> None:
        rows = quarantined(using, session.pk).filter(position=position)
        if branch is not None:
            homes = Branch._base_manager.using(using).filter(**Branch.of_label(branch))
            rows = rows.filter(branch__parent__in=homes.filter(session_id=session.pk))
        count = rows.aggregate(count=Count("pk"))["count"]
        if not count:
            raise SessionItem.DoesNotExist(
                f"The session has no quarantined row of position {position}. "
                "examine() lists those it has."
            )
        if count > 1:
            raise SessionItem.MultipleObjectsReturned(
                f"Several branches lost a row of position {position}: name the branch."
            )
        pk, home = rows.values_list("pk", "branch__parent_id").get()
        SessionItem._base_manager.using(using).filter(pk=pk).update(branch_id=home)
        renumber(using, session.pk)

    backend.change(SessionKey(session.session_id, session.user_id), move)
