"""The rows of runs that wait for approval: paused, answered, withdrawn.

All functions here are synchronous and run in a database thread.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from agent_sessions import approvals
from agent_sessions.approvals import Paused
from agent_sessions.exceptions import (
    InterruptExpired,
    InvalidApproval,
    UnknownInterrupt,
)
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import records
from agent_sessions.runs.setup import Conversation
from agent_sessions.times import stored

logger = logging.getLogger("agent_sessions.runs")


@dataclass(frozen=True, slots=True)
class Pending:
    """A paused run that waits for answers, as it was sealed."""

    run: AgentRun
    paused: Paused

    @property
    def interrupts(self) -> list[dict[str, Any]]:
        """The open approvals, as a client sees them."""
        return self.paused.interrupts

    @property
    def fence(self) -> int:
        """The number of the session's lease when this was read."""
        return self.run.session.fence


@sensitive_variables()
def pause(
    conversation: Conversation,
    lease: records.Lease,
    outcome: records.Outcome,
    paused: Paused,
) -> None:
    """Keep a run's state until its tool calls are approved or refused."""
    backend, key = conversation.backend, conversation.key
    using = backend.directory.using
    with transaction.atomic(using):
        records.close(conversation, lease, outcome)
        AgentRun._base_manager.using(using).filter(pk=lease.run.pk).update(
            state=approvals.seal(backend, key, lease.run, lease.fence, paused),
            expires_at=_column(paused.expires_at),
            finished_at=None,
        )
        records.release(conversation, lease, outcome, AgentSession.State.WAITING)


def pending(conversation: Conversation) -> Pending | None:
    """Find the paused run that waits for answers; None where none can be given.

    Raises UnknownEncryptionKey.
    """
    run = _waiting(conversation)
    if run is None or _is_late(run):
        return None
    try:
        paused = approvals.unseal(conversation.backend, conversation.key, run)
    except InvalidApproval:
        return None
    return None if paused.is_over else Pending(run, paused)


def claimable(conversation: Conversation, interrupt_ids: set[str]) -> Pending:
    """Find the paused run whose open interrupts are exactly those answered.

    Raises UnknownInterrupt, and with the approval withdrawn InterruptExpired and
    InvalidApproval; AG-UI asks that all open ones be answered at once.
    """
    run = _waiting(conversation)
    if run is None:
        raise UnknownInterrupt("Nothing waits for approval in this conversation.")
    backend, key = conversation.backend, conversation.key
    try:
        paused = None if _is_late(run) else approvals.unseal(backend, key, run)
    except InvalidApproval:
        withdraw(conversation, run.session.fence, error_code="invalid_approval")
        raise
    if paused is None or paused.is_over:
        withdraw(conversation, run.session.fence)
        raise InterruptExpired(
            "The time to approve this is over. Nothing was done; ask again."
        )
    found = Pending(run, paused)
    if interrupt_ids != {interrupt["id"] for interrupt in found.interrupts}:
        raise UnknownInterrupt(
            "Answer every open approval of this conversation, and no other."
        )
    return found


def withdraw(conversation: Conversation, fence: int, *, error_code: str = "") -> bool:
    """Drop what waits for approval, so that the conversation can go on.

    Only while the session's lease has the number `fence`: what was paused since stays.
    """
    using = conversation.backend.directory.using
    with transaction.atomic(using):
        freed: int = (
            conversation.rows()
            .filter(state=AgentSession.State.WAITING, fence=fence)
            # Counted on, so that what was sealed doesn't open if it is put back.
            .update(state=AgentSession.State.IDLE, fence=F("fence") + 1)
        )
        if freed:
            AgentRun._base_manager.using(using).filter(
                session_id=conversation.pk, status=AgentRun.Status.WAITING
            ).update(
                status=AgentRun.Status.CANCELLED,
                error_code=error_code,
                finished_at=timezone.now(),
                state="",
            )
    return bool(freed)


def recover(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first of what ended without saying so.

    Raises UnknownEncryptionKey.
    """
    row = records.free(conversation, stale_after)
    if (
        row is not None
        and row.state == AgentSession.State.WAITING
        and pending(conversation) is None
    ):
        if withdraw(conversation, row.fence):
            logger.warning(
                "Session %s waited for an approval that can't be given any more; it "
                "was withdrawn",
                row.pk,
            )
        row.refresh_from_db()
    return row


def _waiting(conversation: Conversation) -> AgentRun | None:
    """Read the newest run and its session at once, if it waits.

    After a newer run the conversation has gone on without the answer.
    """
    run: AgentRun | None = (
        AgentRun._base_manager.using(conversation.backend.directory.using)
        .filter(session_id=conversation.pk)
        .select_related("session")
        .order_by("-pk")
        .first()
    )
    return run if run and run.status == AgentRun.Status.WAITING else None


def _is_late(run: AgentRun) -> bool:
    # The column may end the time early; what was sealed can't be prolonged by it.
    return run.expires_at is not None and run.expires_at <= timezone.now()


def _column(moment: float) -> datetime:
    return stored(datetime.fromtimestamp(moment, UTC))
