"""One session, from its lease to its last row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db.models import Count, Min

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.lineage import Lineages, visible
from agent_sessions.doctor.findings import CODES, Finding
from agent_sessions.doctor.leases import Leases
from agent_sessions.doctor.quarantine import put_away
from agent_sessions.doctor.rows import Fault, Reader, columns_of
from agent_sessions.doctor.turns import renumber
from agent_sessions.items import first_line
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.reports import guarded

_MOVED = frozenset({"orphan_output", "duplicate_turn", "unreadable_row", "scalar_row"})


class Examination:
    """Look at a session that no run holds; mend what is found where `repair` says so.

    Who repairs holds the session's row. Rows are mended page by page as they are read,
    so that memory is bounded however many there are.
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
        self.leases = Leases(backend, row)
        self.lineages = Lineages(self.using)
        self.findings: list[Finding] = []
        self.items = 0
        self._sessions = AgentSession.objects.using(self.using).filter(pk=row.pk)
        self._items = SessionItem._base_manager.using(self.using)
        self._branches = Branch._base_manager.using(self.using).filter(
            session_id=row.pk
        )
        self._changed = False

    @guarded
    def run(self) -> None:
        """Look at everything."""
        waiting_from = self.leases.waiting_from()
        self._check_leases()
        branches = list(self._branches.order_by("pk"))
        current = self._check_current(branches)
        # Parents are older than their children, so mended before they are inherited.
        for branch in branches:
            if not branch.is_quarantine:
                self._check_branch(branch, waiting_from)
        if self.repair and self._changed:
            renumber(self.using, self.row.pk, self.batch_size)
        self._check_count()
        if current is not None:
            self._check_title(current)

    def _check_leases(self) -> None:
        found = list(self.leases.find())
        for code, told in found:
            self._add(code, **told)
        if self.repair and found:
            self.leases.mend()

    def _check_current(self, branches: list[Branch]) -> Branch | None:
        live = {branch.pk: branch for branch in branches if branch.archived_at is None}
        current = live.get(self.row.branch_id or 0)
        if current is not None:
            return current
        self._add("no_branch")
        main = next(
            (b for b in branches if b.name == MAIN_BRANCH and not b.version), None
        )
        if self.repair:
            if main is None:
                main = Branch._base_manager.using(self.using).create(
                    session_id=self.row.pk, name=MAIN_BRANCH
                )
            self._branches.filter(pk=main.pk).update(archived_at=None)
            self._sessions.update(branch=main)
        if main is not None:
            # What is looked at next is as it will be, without a repair too.
            main.archived_at = None
        return main

    def _check_branch(self, branch: Branch, waiting_from: int | None) -> None:
        inherited = self.lineages.of(branch.pk)[1:]
        reader = Reader(self.using, branch, inherited, self.batch_size)
        for faults in reader.pages():
            self.read(reader.items)
            for fault in faults:
                self._add(fault.code, branch, fault.row.position)
            if self.repair and faults:
                self._mend(branch, faults)
        self.items += reader.items
        for position in sorted(reader.open.values()):
            if waiting_from is None or position < waiting_from:
                self._add("dangling_call", branch, position)
        if reader.first_wrong_turn is not None:
            self._changed = True
            self._add(
                "wrong_turn", branch, reader.first_wrong_turn, count=reader.wrong_turns
            )
        elif branch.archived_at is None and branch.turn != reader.turn:
            self._changed = True
            self._add(
                "wrong_branch_turn", branch, found=branch.turn, expected=reader.turn
            )
        self._check_head(branch, reader.last)

    def _check_head(self, branch: Branch, last: int) -> None:
        begin = branch.fork_position or 0
        hidden = self._items.filter(branch_id=branch.pk, position__lte=begin).aggregate(
            count=Count("pk"), first=Min("position")
        )
        if hidden["count"]:
            self._add("hidden_rows", branch, hidden["first"], count=hidden["count"])
        last = max(last, begin)
        if last > branch.head:
            self._add("wrong_head", branch, found=branch.head, expected=last)
            if self.repair:
                self._branches.filter(pk=branch.pk).update(head=last)

    def _mend(self, branch: Branch, faults: list[Fault]) -> None:
        moved = [fault for fault in faults if fault.code in _MOVED]
        if moved:
            put_away(self.using, branch, [fault.row.pk for fault in moved])
        for fault in faults:
            if fault.drawn is not None:
                rows = self._items.filter(pk=fault.row.pk)
                rows.update(**columns_of(fault))
            if fault.instead is not None:
                # What was used to answer the message counts for the one that stays.
                AgentRun._base_manager.using(self.using).filter(
                    session_id=self.row.pk, turn_item=fault.row.pk
                ).update(turn_item=fault.instead)
        self._changed = True

    def _check_count(self) -> None:
        # Quarantined rows count too: they are stored, and cleared with the others.
        expected = self._items.filter(branch__session_id=self.row.pk).count()
        found = self.row.item_count
        if found != expected:
            self._add("wrong_item_count", found=found, expected=expected)
            if self.repair:
                self._sessions.update(item_count=expected)

    def _check_title(self, current: Branch) -> None:
        if self.row.title:
            return
        texts = (
            visible(self.using, self.lineages.of(current.pk))
            .filter(**OPENING)
            .exclude(text="")
            .order_by("position")
            .values_list("text", flat=True)
        )
        title = next(filter(None, map(first_line, texts[:100])), "")
        if title:
            self._add("missing_title")
            if self.repair:
                self._sessions.update(title=title)

    def _add(
        self,
        code: str,
        branch: Branch | None = None,
        position: int | None = None,
        **told: Any,
    ) -> None:
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
