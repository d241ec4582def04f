"""Free a session from what ended without saying so. All functions are synchronous."""

from __future__ import annotations

import logging
from datetime import timedelta

from django.db.models import F, Q

from agent_sessions import approvals
from agent_sessions.backends.directory import NO_RUN
from agent_sessions.backends.leases import (
    RUN_SILENCE,
    is_dead,
    is_over,
    is_silent,
    judged,
)
from agent_sessions.backends.run_rows import Status
from agent_sessions.concurrency.connections import transact
from agent_sessions.models import AgentSession
from agent_sessions.runs import announcing
from agent_sessions.runs.setup import Conversation

logger = logging.getLogger("agent_sessions.runs")

State = AgentSession.State


def recover(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first of what ended without saying so.

    Raise UnknownEncryptionKey.
    """
    row = free(conversation, stale_after)
    if (
        row is not None
        and row.state == State.WAITING
        and approvals.pending(conversation.backend, conversation.key, row.pk) is None
    ):
        if withdraw(conversation, row.fence):
            logger.warning(
                "Session %s waited for an approval that can't be given any more; it "
                "was withdrawn",
                row.pk,
            )
        row.refresh_from_db()
    return row


def free(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first from a run that ended without saying so."""
    silence = timedelta(seconds=stale_after)
    row: AgentSession | None = judged(conversation.rows(), silence).first()
    if row is not None and row.run_id and is_over(row):
        abandon(conversation, row, silence)
        row.refresh_from_db()
    return row


def abandon(
    conversation: Conversation, row: AgentSession, silence: timedelta = RUN_SILENCE
) -> None:
    """Free a session from the run that its row names, if that is over.

    A run that has been heard of since the row was read keeps its lease.
    """
    gone = Q() if is_dead(row.run_owner) else is_silent("run_seen_at", silence)
    held = conversation.rows().filter(gone, run_id=row.run_id, fence=row.fence)

    def end() -> None:
        if held.update(**NO_RUN, fence=F("fence") + 1):
            lost = conversation.runs().filter(run_id=row.run_id, status=Status.RUNNING)
            announcing.tell_ended(conversation, lost, Status.INTERRUPTED, "interrupted")

    transact(conversation.using, end)


def withdraw(conversation: Conversation, fence: int, *, error_code: str = "") -> bool:
    """Drop what waits for approval, so that the conversation can go on.

    Only while the session's lease has the number `fence`: what was paused since stays.
    """

    def drop() -> int:
        freed: int = (
            conversation.rows()
            .filter(state=State.WAITING, fence=fence)
            # Counted on, so that what was sealed doesn't open if it is put back.
            .update(state=State.IDLE, fence=F("fence") + 1)
        )
        if freed:
            waiting = conversation.runs().filter(status=Status.WAITING)
            announcing.tell_ended(conversation, waiting, Status.CANCELLED, error_code)
        return freed

    return bool(transact(conversation.using, drop))
