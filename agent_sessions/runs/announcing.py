"""What receivers of signals are told of runs. All functions run in a database thread."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.dispatch import Signal
from django.utils import timezone

from agent_sessions import signals
from agent_sessions.approvals import Paused
from agent_sessions.backends import run_rows
from agent_sessions.backends.run_rows import Runs
from agent_sessions.models import AgentRun
from agent_sessions.runs.setup import Conversation

if TYPE_CHECKING:
    from agent_sessions.runs.records import Lease, Outcome


def tell(signal: Signal, conversation: Conversation, run_id: str, **more: Any) -> None:
    """Announce what has happened to a run."""
    key = conversation.key
    signals.announce(
        signal,
        AgentRun,
        conversation.using,
        session_id=key.session_id,
        backend=conversation.backend.alias,
        user_id=key.user_id,
        run_id=run_id,
        **more,
    )


def tell_finished(conversation: Conversation, lease: Lease, outcome: Outcome) -> None:
    """Announce how a run ends and what it used, before its row says so.

    One that was found dead has been announced.
    """
    runs = conversation.runs().filter(pk=lease.run.pk, status=run_rows.Status.RUNNING)
    if not signals.is_heard(signals.run_finished, AgentRun) or not runs.exists():
        return
    took = timezone.now() - lease.run.started_at
    tell(
        signals.run_finished,
        conversation,
        lease.run.run_id,
        status=outcome.status,
        error_code=outcome.error_code,
        seconds=max(took.total_seconds(), 0.0),
        **outcome.spent.counters(),
    )


def tell_paused(conversation: Conversation, run_id: str, paused: Paused) -> None:
    """Announce that a run waits for approvals."""
    tell(
        signals.approval_requested,
        conversation,
        run_id,
        count=len(paused.interrupts),
        expires_at=datetime.fromtimestamp(paused.expires_at, UTC),
    )


def tell_ended(
    conversation: Conversation, runs: Runs, status: str, error_code: str = ""
) -> None:
    """End runs that can't say any more what they used, and announce it."""
    ids = list(runs.values_list("run_id", flat=True))
    run_rows.end(runs, status, error_code)
    ended = {"status": str(status), "error_code": error_code, "seconds": None}
    for run_id in ids:
        tell(signals.run_finished, conversation, run_id, **ended)
