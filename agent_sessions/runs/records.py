"""The rows of runs: the lease, its fencing number, usage.

All functions here are synchronous and run in a database thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from django.db import transaction
from django.db.models import BigIntegerField, F, Q, Value
from django.db.models.functions import Greatest
from django.utils import timezone

from agent_sessions.backends.database.lineage import Lineages
from agent_sessions.backends.database.usage import opening
from agent_sessions.backends.leases import (
    RUN_SILENCE,
    DatabaseNow,
    is_over,
    is_silent,
    judged,
)
from agent_sessions.backends.processes import is_dead, this_process
from agent_sessions.exceptions import (
    InterruptsPending,
    SessionBusy,
    SessionDoesNotExist,
    UnknownInterrupt,
)
from agent_sessions.models import AgentRun, AgentSession, Branch
from agent_sessions.runs.setup import Conversation
from agent_sessions.usage import Spent

if TYPE_CHECKING:
    from agent_sessions.runs.pausing import Pending

_UNANSWERED = frozenset(
    {AgentRun.Status.FAILED, AgentRun.Status.CANCELLED, AgentRun.Status.INTERRUPTED}
)


@dataclass(frozen=True, slots=True)
class Lease:
    """A session's row, held for one run."""

    run: AgentRun
    fence: int
    # The last position before the run; None where the store must be asked.
    base: int | None
    agent_name: str
    # Whether the run before it failed, so that its message may come again.
    is_retry: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended and what it used."""

    status: str
    spent: Spent
    agent_name: str = ""
    error_code: str = ""
    trace_id: str = ""
    # The last positions before and after it, of a store that is not the database.
    base: int | None = None
    head: int | None = None


def begin(
    conversation: Conversation,
    run_id: str,
    *,
    model: str,
    stale_after: float,
    answers: Pending | None = None,
) -> Lease:
    """Take the lease and open the run's row; `answers` is the paused run it resumes.

    Raises SessionBusy, InterruptsPending, and UnknownInterrupt where the paused run
    has been answered already: of two clicks, one wins.
    """
    using = conversation.backend.directory.using
    with transaction.atomic(using):
        row = _take(conversation, run_id, stale_after, resuming=answers is not None)
        branch = Branch._base_manager.using(using).filter(pk=row.branch_id).first()
        previous = last_run(conversation)
        run = AgentRun._base_manager.using(using).create(
            session=row,
            branch=branch,
            run_id=run_id,
            agent_name=row.agent_name,
            model=model[:255],
            sdk_version=_sdk_version(),
        )
        if answers is not None:
            _claim(answers, row, run)
    base = branch.head if branch else 0
    return Lease(
        run,
        row.fence,
        base=base if conversation.backend.in_database else None,
        agent_name=row.agent_name,
        is_retry=previous is not None and previous.status in _UNANSWERED,
    )


def _claim(answers: Pending, row: AgentSession, run: AgentRun) -> None:
    """Close the paused run, which `run` goes on from, if it is still as it was read."""
    # The lease that was just taken follows the one that paused it, and no other.
    is_next = row.fence == answers.fence + 1
    paused = AgentRun._base_manager.using(run._state.db).filter(
        pk=answers.run.pk, session_id=row.pk, status=AgentRun.Status.WAITING
    )
    if not is_next or not paused.update(
        status=AgentRun.Status.COMPLETED, resumed_by=run, state=""
    ):
        raise UnknownInterrupt(
            "This approval has been answered already. Reload the conversation."
        )


def _take(
    conversation: Conversation, run_id: str, stale_after: float, *, resuming: bool
) -> AgentSession:
    """Compare and set the lease on the session's row."""
    state = AgentSession.State.WAITING if resuming else AgentSession.State.IDLE
    # The write comes first: on SQLite a transaction that reads first may not write.
    if not _compare_and_set(conversation, run_id, state):
        silence = timedelta(seconds=stale_after)
        row = judged(conversation.rows(), silence).first()
        if row is None:
            raise SessionDoesNotExist(conversation.session_id)
        if row.run_id and is_over(row):
            abandon(conversation, row, silence)
            row.refresh_from_db()
        if not _compare_and_set(conversation, run_id, state):
            raise _refusal(row)
    taken: AgentSession = conversation.rows().get()
    return taken


def _compare_and_set(conversation: Conversation, run_id: str, state: str) -> bool:
    updated = (
        conversation.rows()
        .filter(run_id="", state=state)
        .update(
            run_id=run_id,
            run_owner=this_process(),
            run_seen_at=DatabaseNow(),
            # What a run resumes was sealed with the number before.
            fence=F("fence") + 1 if state == AgentSession.State.WAITING else _fresh(),
            state=AgentSession.State.RUNNING,
        )
    )
    return bool(updated)


def _fresh() -> Greatest:
    """Return a higher lease number than the row's, which no other life of it has had.

    A session that is deleted and made again counts anew, and one of a restored backup
    again: a number that came back would let a run of the former life write on.
    """
    moment = Value(time.time_ns() // 1000, BigIntegerField())
    return Greatest(F("fence") + 1, moment, output_field=BigIntegerField())


def _refusal(row: AgentSession) -> Exception:
    if row.run_id:
        return SessionBusy(row.run_id)
    if row.state == AgentSession.State.WAITING:
        return InterruptsPending(
            "A tool call waits for approval. Answer it before you write on."
        )
    return UnknownInterrupt("Nothing waits for approval in this conversation.")


def abandon(
    conversation: Conversation, row: AgentSession, silence: timedelta = RUN_SILENCE
) -> None:
    """Free a session from the run that its row names, if that is over.

    A run that has been heard of since the row was read keeps its lease.
    """
    using, run_id = conversation.backend.directory.using, row.run_id
    gone = Q() if is_dead(row.run_owner) else is_silent("run_seen_at", silence)
    freed = (
        conversation.rows()
        .filter(gone, run_id=run_id, fence=row.fence)
        .update(
            run_id="",
            run_owner="",
            run_seen_at=None,
            fence=F("fence") + 1,
            state=AgentSession.State.IDLE,
        )
    )
    if freed:
        AgentRun._base_manager.using(using).filter(
            session_id=conversation.pk, run_id=run_id, status=AgentRun.Status.RUNNING
        ).update(
            status=AgentRun.Status.INTERRUPTED,
            error_code="interrupted",
            finished_at=timezone.now(),
        )


def beat(conversation: Conversation, lease: Lease) -> bool:
    """Keep the lease alive; False where it is lost."""
    updated: int = (
        conversation.rows()
        .filter(run_id=lease.run.run_id, fence=lease.fence)
        .update(run_seen_at=DatabaseNow())
    )
    return bool(updated)


def finish(conversation: Conversation, lease: Lease, outcome: Outcome) -> None:
    """Close the run's row, count its usage, give the lease back."""
    using = conversation.backend.directory.using
    with transaction.atomic(using):
        close(conversation, lease, outcome)
        release(conversation, lease, outcome, AgentSession.State.IDLE)


def find_run(conversation: Conversation, run_id: str) -> AgentRun | None:
    """Find a run of this session by the id its client gave it."""
    using = conversation.backend.directory.using
    return (
        AgentRun._base_manager.using(using)
        .filter(session_id=conversation.pk, run_id=run_id)
        .first()
    )


def last_run(conversation: Conversation) -> AgentRun | None:
    """Find the session's newest run."""
    using = conversation.backend.directory.using
    return (
        AgentRun._base_manager.using(using)
        .filter(session_id=conversation.pk)
        .order_by("-pk")
        .first()
    )


def free(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first from a run that ended without saying so."""
    silence = timedelta(seconds=stale_after)
    row: AgentSession | None = judged(conversation.rows(), silence).first()
    if row is None:
        return None
    if row.run_id and is_over(row):
        with transaction.atomic(conversation.backend.directory.using):
            abandon(conversation, row, silence)
        row.refresh_from_db()
    return row


def close(conversation: Conversation, lease: Lease, outcome: Outcome) -> None:
    """Write down in a run's row how it ended, and what it wrote."""
    using, run = conversation.backend.directory.using, lease.run
    base, head = lease.base, outcome.head
    if base is not None:
        heads = Branch._base_manager.using(using).filter(pk=run.branch_id)
        head = heads.values_list("head", flat=True).first()
    else:
        base = outcome.base
    wrote = base is not None and head is not None and head > base
    # What a run wrote that has lost its lease is cleared, or followed by another's.
    kept = wrote and conversation.rows().filter(fence=lease.fence).exists()
    opened = None
    if kept and lease.base is not None and run.branch_id is not None:
        opened = opening(using, Lineages(using), run.branch_id)
    AgentRun._base_manager.using(using).filter(pk=run.pk).update(
        status=outcome.status,
        agent_name=outcome.agent_name[:255],
        error_code=outcome.error_code,
        trace_id=outcome.trace_id,
        finished_at=timezone.now(),
        first_position=base + 1 if base is not None and wrote else None,
        last_position=head if wrote else None,
        turn=opened.turn if opened else 0,
        turn_item=opened.item if opened else None,
        **outcome.spent.columns(),
    )


def release(
    conversation: Conversation, lease: Lease, outcome: Outcome, state: str
) -> None:
    """Count a run's usage and give its lease back; `state` is the session's then."""
    rows = conversation.rows()
    rows.update(
        **{name: F(name) + used for name, used in outcome.spent.counters().items()},
        **({"agent_name": outcome.agent_name[:255]} if outcome.agent_name else {}),
    )
    rows.filter(run_id=lease.run.run_id, fence=lease.fence).update(
        run_id="", run_owner="", run_seen_at=None, state=state
    )


def _sdk_version() -> str:
    from agents import __version__

    return __version__[:32]
