"""The rows of runs that wait in a queue for a worker. All functions are synchronous.

What a run is asked stands sealed in its row: a queue carries ids. The lease is held for
it meanwhile, by no process; the worker that takes it over does the run.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from django.db import Error
from django.views.decorators.debug import sensitive_variables

from agent_sessions.agui import (
    RunRequest,
    StreamOptions,
    run_error,
    run_finished,
    run_started,
)
from agent_sessions.approvals import Paused, Pending
from agent_sessions.backends import run_rows
from agent_sessions.backends.leases import QUEUED, DatabaseNow, this_process
from agent_sessions.backends.run_rows import Status
from agent_sessions.concurrency.connections import transact
from agent_sessions.exceptions import EncryptionError
from agent_sessions.models import AgentRun
from agent_sessions.runs import event_rows, records
from agent_sessions.runs.event_rows import About, Chunk, Unwritten
from agent_sessions.runs.failures import message_for
from agent_sessions.runs.forking import Fork
from agent_sessions.runs.log import Event, Frame
from agent_sessions.runs.records import Lease, Outcome
from agent_sessions.runs.resuming import claimable
from agent_sessions.runs.setup import Conversation, RunLimits
from agent_sessions.usage import Spent


@dataclass(frozen=True, slots=True)
class Taken:
    """A run that this process has taken over from the queue."""

    lease: Lease
    request: RunRequest
    # The paused run that it resumes.
    waiting: Pending | None


def put(
    conversation: Conversation,
    request: RunRequest,
    limits: RunLimits,
    options: StreamOptions,
) -> bool:
    """Take the lease for a run and write down what it is asked, for a worker.

    Return False if its id was used before. Raise what RunManager.start() does.
    """
    waiting = None
    fork = Fork(conversation, request, options) if request.forks else None
    if request.resume:
        waiting = claimable(conversation, request, limits.stale_after)
        if waiting is None:
            return False
    lease = records.begin(
        conversation,
        request.run_id,
        model="",
        limits=limits,
        after=fork.begin if fork else waiting,
    )
    if lease is None:
        return False
    try:
        _write(conversation, fork.request if fork else request, lease, waiting)
    except BaseException:
        with suppress(Error):
            records.give_back(conversation, lease)
        raise
    return True


@sensitive_variables()
def _write(
    conversation: Conversation,
    request: RunRequest,
    lease: Lease,
    waiting: Pending | None,
) -> None:
    content = {
        "bound": [lease.run.pk, lease.fence],
        "request": asdict(request),
        "lease": [lease.base, lease.agent_name, lease.last_status],
        "paused": None if waiting is None else asdict(waiting.paused),
    }
    started = run_started(
        conversation.session_id, request.run_id, request.user_messages
    )
    # Before the transaction: sealing may wait for an append, which waits for the row.
    told = event_rows.rows_of(_told(conversation, lease, 1, started))
    state = conversation.backend.sealer.seal(conversation.key, json.dumps(content))

    def write() -> None:
        held = conversation.rows().filter(run_id=request.run_id, fence=lease.fence)
        if held.update(run_owner=QUEUED, run_seen_at=DatabaseNow()):
            run_rows.write(conversation.runs().filter(pk=lease.run.pk), state=state)
            run_rows.add_events(conversation.using, told)

    transact(conversation.using, write)


def _told(
    conversation: Conversation, lease: Lease, number: int, event: Event
) -> Unwritten:
    # A worker may open a session that changes what is stored.
    about = About(lease.base, is_checked=True)
    chunk = Chunk([Frame(lease.run.run_id, number, event)], about)
    return Unwritten(conversation, lease.run, lease.fence, [chunk])


@sensitive_variables()
def take(conversation: Conversation, run_id: str) -> Taken | None:
    """Take a run over from the queue; None if it was taken before, or has ended.

    One that doesn't open any more is ended. Raise EncryptionError then.
    """

    def claim() -> tuple[AgentRun, int] | None:
        rows = conversation.rows().filter(run_id=run_id, run_owner=QUEUED)
        if not rows.update(run_owner=this_process(), run_seen_at=DatabaseNow()):
            return None
        run = conversation.runs().select_related("session").get(run_id=run_id)
        return run, run.session.fence

    claimed = transact(conversation.using, claim)
    if claimed is None:
        return None
    run, fence = claimed
    try:
        text = conversation.backend.sealer.open(conversation.key, run.state)
        content = json.loads(text or "{}")
        if content.get("bound") != [run.pk, fence]:
            raise EncryptionError(f"Run {run_id!r} was changed while it was queued.")
    except EncryptionError:
        lease = Lease(run, fence, None, "", None)
        finish(conversation, lease, Status.FAILED, "internal")
        raise
    paused: dict[str, Any] | None = content["paused"]
    waiting = None
    if paused is not None:
        resumed = conversation.runs().select_related("session").get(resumed_by=run)
        waiting = Pending(resumed, Paused(**paused))
    base, agent_name, last_status = content["lease"]
    lease = Lease(run, fence, base, agent_name, last_status, waiting)
    return Taken(lease, RunRequest(**content["request"]), waiting)


def cancel(conversation: Conversation, run_id: str, status: str, code: str) -> bool:
    """End a run that no worker has taken over yet; return whether there was one."""
    try:
        taken = take(conversation, run_id)
    except EncryptionError:
        return True
    if taken is not None:
        finish(conversation, taken.lease, status, code)
    return taken is not None


def finish(conversation: Conversation, lease: Lease, status: str, code: str) -> None:
    """End a run that has been taken over and hasn't begun; its listeners hear it."""
    run_id = lease.run.run_id
    last = run_finished(conversation.session_id, run_id, {"type": "cancelled"})
    if code:
        last = run_error(code, message_for(code), run_id=run_id)
    outcome = Outcome(status, Spent(), error_code=code)
    told = _told(conversation, lease, 2, last)
    records.finish(conversation, lease, outcome, told=told)


def ask_to_stop(
    conversation: Conversation, run_id: str, mode: str, stale_after: float
) -> bool:
    """End a run that is queued, else ask its process; return whether it went on."""
    if cancel(conversation, run_id, Status.CANCELLED, ""):
        return True
    return records.ask_to_stop(conversation, run_id, mode, stale_after)
