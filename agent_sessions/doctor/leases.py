"""What is wrong with who holds a session: leases, runs and approvals."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.db.models import Min, Q
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
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
        self._runs = AgentRun.objects.using(backend.using).filter(session_id=row.pk)
        now = timezone.now()
        waiting = self._runs.filter(status=Status.WAITING)
        self._expired = waiting.filter(expires_at__lte=now)
        # What a client could answer, and what the SDK can go on from.
        lost = Q(state="") | Q(interrupts__in=("", "[]"))
        self._lost = waiting.exclude(expires_at__lte=now).filter(lost)
        self._good = waiting.exclude(expires_at__lte=now).exclude(lost)
        self._unfinished = self._runs.filter(
            status=Status.RUNNING, started_at__lt=now - RUN_LENGTH
        ).exclude(run_id=row.run_id or None)

    def waiting_from(self) -> int | None:
        """Give the first position whose calls an open approval explains."""
        if not self._good.exists():
            return None
        first: int | None = self._good.aggregate(first=Min("first_position"))["first"]
        return first or 0

    def find(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give codes, each with what its sentence tells."""
        stale = bool(self.row.run_id)
        if stale:
            yield "stale_lease", {}
        for code, runs in (
            ("unfinished_run", self._unfinished),
            ("expired_approval", self._expired),
            ("lost_state", self._lost),
        ):
            for _ in range(runs.count()):
                yield code, {}
        # An approval that ends by itself leaves the state to its own finding.
        ending = self._expired.exists() or self._lost.exists()
        expected = self._state()
        if not stale and not ending and self.row.state != expected:
            yield "wrong_state", {"found": self.row.state, "expected": expected}

    def mend(self) -> None:
        """Give the session back, and end what can't go on."""
        if self.row.run_id:
            from agent_sessions.runs import Conversation, records

            key = SessionKey(self.row.session_id, self.row.user_id)
            conversation = Conversation(self.row.pk, self.backend, key)
            records.abandon(conversation, self.row)
        now = timezone.now()
        self._unfinished.update(
            status=Status.INTERRUPTED, error_code="interrupted", finished_at=now
        )
        ended = [*self._expired, *self._lost]
        self._runs.filter(pk__in=[run.pk for run in ended]).update(
            status=Status.CANCELLED, finished_at=now, state="", interrupts=""
        )
        sessions = AgentSession.objects.using(self.backend.using)
        sessions.filter(pk=self.row.pk).update(state=self._state())

    def _state(self) -> str:
        return State.WAITING if self._good.exists() else State.IDLE
