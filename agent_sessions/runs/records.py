"""The rows of managed runs: the lease, its fencing number, usage, approvals.

All functions here are synchronous and run in a database thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from django.db import IntegrityError
from django.db.models import BigIntegerField, F, Q, Subquery, Value
from django.db.models.functions import Greatest
from django.views.decorators.debug import sensitive_variables

from agent_sessions import approvals, signals
from agent_sessions.approvals import Paused, Pending
from agent_sessions.backends import run_rows
from agent_sessions.backends.database.lineage import Lineages, ended_in
from agent_sessions.backends.database.usage import opening
from agent_sessions.backends.directory import NO_RUN
from agent_sessions.backends.leases import (
    DatabaseNow,
    this_process,
)
from agent_sessions.backends.run_rows import Status
from agent_sessions.concurrency.connections import transact
from agent_sessions.exceptions import (
    InterruptsPending,
    LeaseLost,
    SessionBusy,
    SessionDoesNotExist,
    UnknownInterrupt,
)
from agent_sessions.models import AgentRun, AgentSession, Branch
from agent_sessions.runs import announcing, event_rows, recovery
from agent_sessions.runs.event_rows import Unwritten
from agent_sessions.runs.setup import Conversation, RunLimits
from agent_sessions.times import stored
from agent_sessions.usage import Spent, sdk_version

logger = logging.getLogger("agent_sessions.runs")

State = AgentSession.State
_UNANSWERED = frozenset({Status.FAILED, Status.CANCELLED, Status.INTERRUPTED})


@dataclass(frozen=True, slots=True)
class Lease:
    """A session's row, held for one run."""

    run: AgentRun
    fence: int
    # The last position before the run; None where the store must be asked.
    base: int | None
    agent_name: str
    # How the run before it ended.
    last_status: str | None
    # What it goes on from, which waits again if the run never begins.
    resumes: Pending | None = None

    @property
    def is_retry(self) -> bool:
        """Whether the run before it failed, so that its message may come again."""
        return self.last_status in _UNANSWERED


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended and what it used."""

    status: str
    spent: Spent
    agent_name: str = ""
    error_code: str = ""
    trace_id: str = ""
    # Of a run whose agent was not known when it began.
    model: str = ""
    # The last positions before and after it, of a store that is not the database.
    base: int | None = None
    head: int | None = None
    message_ids: list[list[Any]] = field(default_factory=list)


def begin(
    conversation: Conversation,
    run_id: str,
    *,
    model: str,
    limits: RunLimits,
    after: Pending | Callable[[AgentSession], None] | None = None,
    taken: list[Lease] | None = None,
) -> Lease | None:
    """Take the lease and open the run's row, in one transaction.

    `after` is the paused run that the new one resumes, or what puts the session's row
    on the branch that the run begins. `taken` gets the lease before the commit, whose
    answer may be lost. Return None if the run's id was used before. Raise SessionBusy, InterruptsPending, SessionDoesNotExist, and
    UnknownInterrupt if the paused run has been answered already: of two clicks, one
    wins.
    """
    using = conversation.using
    answers = after if isinstance(after, Pending) else None

    def open_run() -> Lease | None:
        row = _take(conversation, run_id, limits, answers)
        if row is None:
            return None
        if callable(after):
            after(row)
        branch = _branch_of(conversation, row)
        # What is asked on a branch of its own is no retry.
        is_new = callable(after)
        last_status = None if is_new else _last_status(conversation, row, branch)
        run = run_rows.create(
            using,
            row.pk,
            run_id,
            branch=branch,
            agent_name=row.agent_name,
            model=model,
            sdk_version=sdk_version(),
        )
        announcing.tell(signals.run_started, conversation, run_id)
        if answers is not None:
            _claim(conversation, answers, row, run)
        base = _head_of(run) if conversation.backend.in_database else None
        lease = Lease(run, row.fence, base, row.agent_name, last_status, answers)
        if taken is not None:
            taken[:] = [lease]
        return lease

    if callable(after) and conversation.runs().filter(run_id=run_id).exists():
        # Its message may not be there any more, since the first time has left it.
        return None
    try:
        return transact(using, open_run)
    except IntegrityError:
        # The row of the id is there: it ended meanwhile, or ran in the turn before.
        return None


def give_back(conversation: Conversation, lease: Lease) -> None:
    """Release a lease that no run has begun with, if it was taken at all."""
    unused = Outcome(Status.INTERRUPTED, Spent(), error_code="interrupted")
    paused = None if lease.resumes is None else lease.resumes.paused
    if paused is not None:
        unused = Outcome(Status.WAITING, Spent(), agent_name=lease.agent_name)
    finish(conversation, lease, unused, paused)


def _take(
    conversation: Conversation,
    run_id: str,
    limits: RunLimits,
    answers: Pending | None,
) -> Any:
    """Take the lease; return the session's row, with its last run's status and branch."""
    state = State.IDLE if answers is None else State.WAITING
    # The write comes first: on SQLite a transaction that reads first may not write.
    if not _compare_and_set(conversation, run_id, state):
        # The id comes first: a repeat is no second run, whatever the session does.
        if conversation.runs().filter(run_id=run_id).exists():
            return None
        if answers is None:
            row = recovery.recover(conversation, limits.stale_after)
        else:
            row = recovery.free(conversation, limits.stale_after)
        if row is None:
            raise SessionDoesNotExist(conversation.session_id)
        if answers is None and row.state == State.WAITING and not limits.must_answer:
            # The run closes the calls in the history, before what it is asked.
            recovery.withdraw(conversation, row.fence)
        if not _compare_and_set(conversation, run_id, state):
            raise refusal(row)
    newest = run_rows.newest(conversation.using, conversation.pk)
    return (
        conversation.rows()
        .select_related("branch")
        .annotate(
            last_status=Subquery(newest.values("status")[:1]),
            last_branch=Subquery(newest.values("branch")[:1]),
        )
        .get()
    )


def _last_status(
    conversation: Conversation, row: Any, branch: Branch | None
) -> str | None:
    """Return how the last run ended that began on a branch or that it shows."""
    status: str | None = row.last_status
    if branch is None or row.last_branch in {None, branch.pk}:
        return status
    using = conversation.using
    shown = ended_in(Lineages(using).of(branch.pk))
    # An undo or a compaction moves the name to another row.
    branches = Branch._base_manager.using(using).filter(session_id=row.pk)
    named = branches.filter(name=branch.name).values_list("pk", flat=True)
    # By keys: for a join PostgreSQL may read the branches of all others.
    own = Q(branch=None) | Q(branch__in=list(named)) | shown
    runs = run_rows.newest(using, conversation.pk).filter(own)
    return runs.values_list("status", flat=True).first()


def _branch_of(conversation: Conversation, row: AgentSession) -> Branch | None:
    """Return the branch that a run writes to: the current one, or the key's own."""
    if conversation.key.branch is None:
        return row.branch
    return conversation.backend.directory.branches(conversation.key).first()


def _head_of(run: AgentRun) -> int:
    return 0 if run.branch is None else run.branch.head


def _claim(
    conversation: Conversation, answers: Pending, row: AgentSession, run: AgentRun
) -> None:
    """Close the paused run, which `run` goes on from, if it is still as it was read.

    Its state stays until a call begins, or `run` ends: one that dies first waits again.
    """
    # The lease that was just taken follows the one that paused it, and no other.
    is_next = row.fence == answers.fence + 1
    paused = conversation.runs().filter(pk=answers.run.pk, status=Status.WAITING)
    if not is_next or not run_rows.write(
        paused, status=Status.COMPLETED, resumed_by=run
    ):
        raise UnknownInterrupt(
            "This approval has been answered already. Reload the conversation."
        )
    waited, ids = answers.run.run_id, {"resumed_by": run.run_id}
    announcing.tell(signals.approval_answered, conversation, waited, **ids)


def spend(conversation: Conversation, lease: Lease) -> None:
    """Note that approved calls are about to run, so that nobody is asked about them again.

    Raise LeaseLost where somebody is, since this run was taken for dead.
    """
    own = conversation.runs().filter(resumed_by=lease.run.pk)

    def note() -> bool:
        # Recovery writes the session's row first too, so that one of the two waits.
        held = conversation.rows().filter(run_id=lease.run.run_id, fence=lease.fence)
        return bool(held.update(run_seen_at=DatabaseNow())) and bool(
            run_rows.write(own, state="")
        )

    if not transact(conversation.using, note):
        raise LeaseLost


def _compare_and_set(conversation: Conversation, run_id: str, state: str) -> bool:
    updated = (
        conversation.rows()
        .filter(run_id="", state=state)
        .update(
            run_id=run_id,
            run_owner=this_process(),
            run_seen_at=DatabaseNow(),
            # What a run resumes was sealed with the number before.
            fence=F("fence") + 1 if state == State.WAITING else _fresh(),
            state=State.RUNNING,
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


def refusal(row: AgentSession) -> Exception:
    """Return why a session takes no run, and no switch, now."""
    if row.run_id:
        return SessionBusy(row.run_id)
    if row.state == State.WAITING:
        return InterruptsPending(
            "A tool call waits for approval. Answer it before you write on."
        )
    return UnknownInterrupt("Nothing waits for approval in this conversation.")


def ask_to_stop(
    conversation: Conversation, run_id: str, mode: str, stale_after: float
) -> bool:
    """Ask whichever process has a run to stop it; return whether it goes on.

    One whose process is gone is ended here.
    """
    if not conversation.rows().filter(run_id=run_id).update(run_stop=mode):
        return False
    recovery.free(conversation, stale_after)
    return True


@sensitive_variables()
def finish(
    conversation: Conversation,
    lease: Lease,
    outcome: Outcome,
    paused: Paused | None = None,
    told: Unwritten | None = None,
) -> None:
    """Close the run's row, count its usage, give the lease back.

    `paused` is kept until its tool calls are approved or refused. `told` are the events
    up to its last one; one that has lost its lease tells nothing any more.
    """
    key, run = conversation.key, lease.run
    # Before the transaction: sealing may wait for an append, which waits for the row.
    events = [] if told is None else event_rows.rows_of(told)
    sealed = ""
    if paused is not None:
        sealed = approvals.seal(conversation.backend, key, run, lease.fence, paused)

    def close() -> None:
        state = State.IDLE if paused is None else State.WAITING
        rows = conversation.rows()
        held = rows.filter(run_id=lease.run.run_id, fence=lease.fence).update(
            **NO_RUN | {"state": state}
        )
        if not held and _is_closed(conversation, lease):
            # The answer to a commit was lost: it is not counted twice.
            return
        if paused is None:
            announcing.tell_finished(conversation, lease, outcome)
        else:
            announcing.tell_paused(conversation, lease.run.run_id, paused)
        _close(conversation, lease, outcome)
        if lease.resumes is not None:
            answered = conversation.runs().filter(pk=lease.resumes.run.pk)
            run_rows.write(answered, state="")
        if paused is not None:
            run_rows.write(
                conversation.runs().filter(pk=run.pk),
                state=sealed,
                expires_at=stored(datetime.fromtimestamp(paused.expires_at, UTC)),
                finished_at=None,
            )
        rows.update(
            **{name: F(name) + used for name, used in outcome.spent.counters().items()},
            **({"agent_name": outcome.agent_name[:255]} if outcome.agent_name else {}),
        )
        if held:
            run_rows.add_events(conversation.using, events)

    transact(conversation.using, close)


def _is_closed(conversation: Conversation, lease: Lease) -> bool:
    """Return whether a run's row says how it ended, and not only that it was lost."""
    columns = conversation.runs().filter(pk=lease.run.pk).values("status", "requests")
    row = columns.first() or {"status": "", "requests": 0}
    may_go_on = row["status"] in {Status.RUNNING, Status.INTERRUPTED}
    return not may_go_on or row["requests"] > 0


def _close(conversation: Conversation, lease: Lease, outcome: Outcome) -> None:
    """Write down in a run's row how it ended, and what it wrote."""
    using, run = conversation.using, lease.run
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
    run_rows.end(
        conversation.runs().filter(pk=run.pk),
        outcome.status,
        outcome.error_code,
        agent_name=outcome.agent_name,
        trace_id=outcome.trace_id,
        **({"model": outcome.model} if outcome.model else {}),
        first_position=base + 1 if base is not None and wrote else None,
        last_position=head if wrote else None,
        turn=opened.turn if opened else 0,
        turn_item=opened.item if opened else None,
        message_ids=outcome.message_ids,
        **outcome.spent.columns(),
    )
