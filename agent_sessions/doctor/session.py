"""The examiners of one session, from its lease to its title."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from django.db.models import Count, Min

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.lineage import Lineages, visible
from agent_sessions.backends.database.numbering import renumber
from agent_sessions.doctor.findings import CODES, Fault, Finding
from agent_sessions.doctor.leases import Leases
from agent_sessions.doctor.rows import Reader
from agent_sessions.items import first_line
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import MAIN_BRANCH, AgentSession, Branch, SessionItem
from agent_sessions.reports import guarded

# After these repairs turns are counted anew.
_MOVED = frozenset({"orphan_output", "duplicate_turn", "unreadable_row", "scalar_row"})
_RENUMBERED = _MOVED | {"wrong_columns", "wrong_turn", "wrong_branch_turn"}


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
        read: Callable[[int], None],
    ) -> None:
        self.using = backend.using
        self.row = row
        self.repair = repair
        self.batch_size = batch_size
        self.read = read
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
        for examiner in (
            partial(self._leases.faults, repair=self.repair),
            self._current_branch,
            self._histories,
            self._item_count,
            self._title,
        ):
            for fault in examiner():
                self._add(fault)
                if self.repair and fault.mend is not None:
                    fault.mend()

    def _add(self, fault: Fault) -> None:
        kind = CODES[fault.code]
        self.findings.append(
            Finding(
                code=fault.code,
                session=self.row.pk,
                session_id=self.row.session_id,
                branch=None if fault.branch is None else fault.branch.label,
                position=fault.position,
                message=kind.message.format(**fault.told),
                repair=kind.repair,
                repaired=self.repair and bool(kind.repair),
            )
        )

    # -- examiners -----------------------------------------------------------------

    def _current_branch(self) -> Iterator[Fault]:
        branches = list(self._branches)
        for branch in branches:
            if branch.pk == self.row.branch_id and branch.archived_at is None:
                self._current = branch
                return
        main = [b for b in branches if b.name == MAIN_BRANCH and not b.version]
        self._current = next(iter(main), None)
        yield Fault("no_branch", mend=self._make_main_current)

    def _make_main_current(self) -> None:
        if self._current is None:
            self._current = self._branches.create(
                session_id=self.row.pk, name=MAIN_BRANCH
            )
        self._branches.filter(pk=self._current.pk).update(archived_at=None)
        self._session.update(branch=self._current)

    def _histories(self) -> Iterator[Fault]:
        # Parents are older than their children, so mended before they are inherited.
        for branch in self._branches.filter(is_quarantine=False).order_by("pk"):
            if self._current is not None and branch.pk == self._current.pk:
                # It is looked at as it will be, without a repair too.
                branch.archived_at = None
            yield from self._history(branch)
        if self.repair and any(found.code in _RENUMBERED for found in self.findings):
            renumber(self.using, self.row.pk, self.batch_size)

    def _history(self, branch: Branch) -> Iterator[Fault]:
        inherited = self._lineages.of(branch.pk)[1:]
        reader = Reader(self.using, branch, inherited, self.batch_size)
        yield from reader.faults(lambda items: self.read(self.items + items))
        self.items += reader.items
        for position in sorted(reader.open.values()):
            if self._waiting_from is None or position < self._waiting_from:
                yield Fault("dangling_call", branch, position)
        begin = branch.fork_position or 0
        hidden = self._items.filter(branch_id=branch.pk, position__lte=begin).aggregate(
            count=Count("pk"), first=Min("position")
        )
        if count := hidden["count"]:
            told = {"count": count}
            yield Fault("hidden_rows", branch, hidden["first"], told=told)
        last = max(reader.last, begin)
        if last > branch.head:
            yield Fault(
                "wrong_head",
                branch,
                mend=partial(self._branches.filter(pk=branch.pk).update, head=last),
                told={"found": branch.head, "expected": last},
            )

    def _item_count(self) -> Iterator[Fault]:
        # Quarantined rows count too: they are stored, and cleared with the others.
        expected = self._items.filter(branch__session_id=self.row.pk).count()
        if self.row.item_count != expected:
            yield Fault(
                "wrong_item_count",
                mend=partial(self._session.update, item_count=expected),
                told={"found": self.row.item_count, "expected": expected},
            )

    def _title(self) -> Iterator[Fault]:
        if self.row.title or self._current is None:
            return
        rows = visible(self.using, self._lineages.of(self._current.pk))
        texts = rows.filter(**OPENING).exclude(text="").order_by("position")
        lines = map(first_line, texts.values_list("text", flat=True)[:100])
        if title := next(filter(None, lines), ""):
            mend = partial(self._session.update, title=title)
            yield Fault("missing_title", mend=mend)
