"""The examiners of one session, from its lease to its title."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

from django.db.models import Count, F, Min
from django.utils import timezone

from agent_sessions import approvals
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.lineage import Lineages, renumber, visible
from agent_sessions.doctor.findings import CODES, Finding
from agent_sessions.doctor.rows import Found, Reader
from agent_sessions.exceptions import InvalidApproval
from agent_sessions.items import title_of
from agent_sessions.items.kinds import OPENING
from agent_sessions.items.text import UNSEEN
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.reports import guarded

# After these repairs turns are counted anew.
_MOVED = frozenset({"orphan_output", "duplicate_turn", "unreadable_row", "scalar_row"})
_RENUMBERED = _MOVED | {"wrong_columns", "wrong_turn", "wrong_branch_turn"}

# Hears how many items each page had that was read.
Progress = Callable[[int], None]


def no_progress(items: int) -> None:
    """Ignore a report of progress."""


class Examination:
    """Look at a session that no run holds; mend what is found where `repair` says so.

    Who repairs holds the session's row. Each fault is mended as it is found, so that
    memory is bounded however many there are, and the next examiner sees what is left.
    """

    def __init__(
        self,
        backend: DatabaseBackend,
        row: AgentSession,
        *,
        repair: bool,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.using = backend.using
        self.row = row
        self.repair = repair
        self.batch_size = batch_size
        self.progress = progress
        self.findings: list[Finding] = []
        self.items = 0
        self._leases = Leases(backend, row)
        self._lineages = Lineages(self.using)
        self._session = AgentSession.objects.using(self.using).filter(pk=row.pk)
        self._items = SessionItem._base_manager.using(self.using)
        branches = Branch._base_manager.using(self.using)
        self._branches = branches.filter(session_id=row.pk)
        self._current: Branch | None = None

    @guarded
    def run(self) -> None:
        """Look at everything."""
        # Before it is mended: it explains calls without an output.
        self._waiting_from = self._leases.waiting_from()
        self._leases.look(self._found, repair=self.repair)
        self._look_at_current_branch()
        self._look_at_histories()
        # Quarantined rows count too: they are stored, and cleared with the others.
        expected = self._items.filter(branch__session_id=self.row.pk).count()
        if (count := self.row.item_count) != expected:
            mend = partial(self._session.update, item_count=expected)
            code = "wrong_item_count"
            self._found(code, mend=mend, found=count, expected=expected)
        self._look_at_title()

    def _found(
        self,
        code: str,
        branch: Branch | None = None,
        position: int | None = None,
        mend: Callable[[], object] | None = None,
        **told: Any,
    ) -> None:
        """Write down what is wrong, and mend it if that is wanted.

        `mend` is None where nothing has to be done, or where it is done with others
        once all are found.
        """
        kind = CODES[code]
        self.findings.append(
            Finding(
                code=code,
                session=self.row.pk,
                session_id=self.row.session_id,
                branch=None if branch is None else branch.label,
                position=position,
                message=kind.message.format(**told),
                repair=kind.repair,
                repaired=self.repair and bool(kind.repair),
            )
        )
        if self.repair and mend is not None:
            mend()

    # -- examiners -----------------------------------------------------------------

    def _look_at_current_branch(self) -> None:
        branches = list(self._branches)
        for branch in branches:
            if branch.pk == self.row.branch_id and branch.archived_at is None:
                self._current = branch
                return
        main = [b for b in branches if b.name == MAIN_BRANCH and not b.version]
        self._current = next(iter(main), None)
        self._found("no_branch", mend=self._make_main_current)

    def _make_main_current(self) -> None:
        if self._current is None:
            self._current = self._branches.create(
                session_id=self.row.pk, name=MAIN_BRANCH
            )
        self._branches.filter(pk=self._current.pk).update(archived_at=None)
        self._session.update(branch=self._current)

    def _look_at_histories(self) -> None:
        # Parents are older than their children, so mended before they are inherited.
        for branch in self._branches.filter(is_quarantine=False).order_by("pk"):
            if self._current is not None and branch.pk == self._current.pk:
                # It is looked at as it will be, without a repair too.
                branch.archived_at = None
            self._look_at_history(branch)
        if self.repair and any(found.code in _RENUMBERED for found in self.findings):
            renumber(self.using, self.row.pk, self.batch_size)

    def _look_at_history(self, branch: Branch) -> None:
        inherited = self._lineages.of(branch.pk)[1:]
        reader = Reader(self.using, branch, inherited, self.batch_size, self._found)
        reader.look(self.progress)
        self.items += reader.items
        for position in sorted(reader.open.values()):
            if self._waiting_from is None or position < self._waiting_from:
                self._found("dangling_call", branch, position)
        begin = branch.fork_position or 0
        hidden = self._items.filter(branch_id=branch.pk, position__lte=begin).aggregate(
            count=Count("pk"), first=Min("position")
        )
        if count := hidden["count"]:
            self._found("hidden_rows", branch, hidden["first"], count=count)
        last = max(reader.last, begin)
        if last > branch.head:
            mend = partial(self._branches.filter(pk=branch.pk).update, head=last)
            head = branch.head
            self._found("wrong_head", branch, mend=mend, found=head, expected=last)

    def _look_at_title(self) -> None:
        if self.row.title not in {"", UNSEEN} or self._current is None:
            return
        rows = visible(self.using, self._lineages.of(self._current.pk))
        texts = rows.filter(**OPENING).order_by("position")
        title = title_of(texts.values_list("text", flat=True)[:100])
        if title not in {"", self.row.title}:
            mend = partial(self._session.update, title=title)
            self._found("missing_title", mend=mend)


# -- leases, runs and approvals --------------------------------------------------------

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

    def look(self, found: Found, *, repair: bool) -> None:
        """Report what is wrong; with `repair`, mend all of it together at the end."""
        stale = bool(self.row.run_id)
        expired, lost = self._waiting["expired"], self._waiting["lost"]
        counts = {
            "stale_lease": int(stale),
            "unfinished_run": self._unfinished.count(),
            "expired_approval": len(expired),
            "lost_state": len(lost),
        }
        for code, count in counts.items():
            for _ in range(count):
                found(code)
        # An approval that ends by itself leaves the state to its own finding.
        expected = self._state()
        is_wrong = not (stale or expired or lost) and self.row.state != expected
        if is_wrong:
            found("wrong_state", found=self.row.state, expected=expected)
        if repair and (is_wrong or any(counts.values())):
            self._mend()

    def _mend(self) -> None:
        """Release the lease and end the runs that can't go on."""
        if self.row.run_id:
            from agent_sessions.runs import Conversation, recovery

            conversation = Conversation(self.row.pk, self.backend, self._key)
            recovery.abandon(conversation, self.row)
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
