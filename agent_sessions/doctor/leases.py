"""What is wrong with who holds a session: leases, runs and approvals."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from typing import Any

from django.db.models import F
from django.utils import timezone

from agent_sessions import approvals
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.doctor.findings import Fault
from agent_sessions.exceptions import InvalidApproval
from agent_sessions.models import AgentRun, AgentSession

Status = AgentRun.Status
State = AgentSession.State
# A run of the SDK's own Runner holds no lease, so only its age tells that it is over.
RUN_LENGTH = timedelta(days=1)


class Leases:
    """A session's lease and runs; no run that is alive holds the session."""

    def __init__(self, backend: DatabaseBackend, row: AgentSession) -> None:
        self.backend = backend
        self.row = row
        self._key = SessionKey(row.session_id, row.user_id)
        self._runs = AgentRun._base_manager.using(backend.using).filter(
            session_id=row.pk
        )
        self._unfinished = self._runs.filter(
            status=Status.RUNNING, started_at__lt=timezone.now() - RUN_LENGTH
        ).exclude(run_id=row.run_id or None)

    @cached_property
    def _waiting(self) -> dict[str, list[AgentRun]]:
        """Return the runs that wait for approval, by what the approval is."""
        found: dict[str, list[AgentRun]] = {"open": [], "expired": [], "lost": []}
        newest = self._runs.order_by("-pk").values_list("pk", flat=True).first()
        runs = self._runs.filter(status=Status.WAITING).select_related("session")
        for run in runs.order_by("pk"):
            found[self._kind(run, is_newest=run.pk == newest)].append(run)
        return found

    def _kind(self, run: AgentRun, *, is_newest: bool) -> str:
        if run.expires_at is not None and run.expires_at <= timezone.now():
            return "expired"
        try:
            paused = approvals.unseal(self.backend, self._key, run)
        except InvalidApproval:
            return "lost"
        if paused.is_over:
            return "expired"
        return "open" if is_newest and paused.interrupts else "lost"

    def waiting_from(self) -> int | None:
        """Return the first position whose calls an open approval explains."""
        firsts = [run.first_position or 0 for run in self._waiting["open"]]
        return min(firsts, default=None)

    def faults(self, *, repair: bool) -> Iterator[Fault]:
        """Return what is wrong; with `repair`, mend all of it together at the end."""
        stale = bool(self.row.run_id)
        expired, lost = self._waiting["expired"], self._waiting["lost"]
        counts = {
            "stale_lease": int(stale),
            "unfinished_run": self._unfinished.count(),
            "expired_approval": len(expired),
            "lost_state": len(lost),
        }
        for code, count in counts.items():
            yield from [Fault(code)] * count
        # An approval that ends by itself leaves the state to its own finding.
        expected = self._state()
        is_wrong = not (stale or expired or lost) and self.row.state != expected
        if is_wrong:
            told = {"found": self.row.state, "expected": expected}
            yield Fault("wrong_state", told=told)
        if repair and (is_wrong or any(counts.values())):
            self._mend()

    def _mend(self) -> None:
        """Give the session back, and end what can't go on."""
        if self.row.run_id:
            from agent_sessions.runs import Conversation, records

            conversation = Conversation(self.row.pk, self.backend, self._key)
            records.abandon(conversation, self.row)
        run_rows.end(self._unfinished, Status.INTERRUPTED, "interrupted")
        ended = self._waiting["expired"] + self._waiting["lost"]
        over = self._runs.filter(pk__in=[run.pk for run in ended])
        run_rows.end(over, Status.CANCELLED)
        columns: dict[str, Any] = {"state": self._state()}
        if ended and not self._waiting["open"]:
            # What was ended doesn't open if it is put back.
            columns["fence"] = F("fence") + 1
        sessions = AgentSession.objects.using(self.backend.using)
        sessions.filter(pk=self.row.pk).update(**columns)

    def _state(self) -> str:
        return State.WAITING if self._waiting["open"] else State.IDLE
