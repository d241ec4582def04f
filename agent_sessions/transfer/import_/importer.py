"""The import itself: sessions one after the other, those refused left aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.reports import guarded
from agent_sessions.transfer.import_.batches import Batches
from agent_sessions.transfer.import_.checks import NAME_LENGTH, check_session
from agent_sessions.transfer.import_.encoding import encode_page
from agent_sessions.transfer.import_.owners import Owners
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
)
from agent_sessions.transfer.import_.runs import write_runs
from agent_sessions.transfer.import_.target import Target

# Sessions that a report names.
MOST_REFUSED = 10_000


@dataclass(slots=True)
class Report:
    """What an import did, or would do."""

    # Sessions that were made, that grew, and that had nothing new.
    made: int = 0
    grown: int = 0
    unchanged: int = 0
    items: int = 0
    branches: int = 0
    runs: int = 0
    # Items that can't be read, and were kept as they are.
    unreadable: int = 0
    # Items that the source itself shows nowhere.
    left_out: int = 0
    # Sessions that were not imported, and why.
    refused: dict[str, str] = field(default_factory=dict)
    # How many more there were, once as many as MOST_REFUSED are named.
    more_refused: int = 0
    # Sessions that were asked for by id, and that the source doesn't have.
    missing: set[str] = field(default_factory=set)

    @property
    def failures(self) -> int:
        """Count the sessions that were wanted and not imported."""
        return len(self.refused) + self.more_refused + len(self.missing)

    def refuse(self, session_id: Any, reason: str) -> None:
        """Name a session that is not imported, and why; memory stays bounded."""
        name = str(session_id)
        if len(name) > NAME_LENGTH:
            name = f"{name[:NAME_LENGTH]}…"
        if name in self.refused or len(self.refused) >= MOST_REFUSED:
            self.more_refused += 1
        else:
            self.refused[name] = reason


class Importer:
    """Import a source's sessions into a backend that keeps them in a database."""

    def __init__(
        self,
        source: Source,
        backend: DatabaseBackend,
        *,
        owners: Owners,
        batch_size: int = 1_000,
        dry_run: bool = False,
        only: Sequence[str] = (),
        in_clear: bool = False,
    ) -> None:
        self.source = source
        self.backend = backend
        self.owners = owners
        self.dry_run = dry_run
        # Whether what was encrypted elsewhere may be stored in clear.
        self.in_clear = in_clear
        self.report = Report(missing=set(only))
        self._batches = Batches(backend.using, batch_size)
        # Told how many items each page had.
        self.progress: Callable[[int], None] | None = None

    @guarded
    def run(self) -> Report:
        """Import everything that is new. Raises UnreadableSource.

        It may be run again after any end: it goes on where it stopped.
        """
        with self._batches.running():
            for session in self.source.sessions():
                self.report.missing.discard(session.session_id)
                try:
                    self._import(session)
                except ImportProblem as exc:
                    self.report.refuse(session.session_id, str(exc))
        return self.report

    def _import(self, session: SourceSession) -> None:
        check_session(session)
        if session.opened and not (self.in_clear or self.backend.encrypts):
            raise ImportProblem(
                "its items are encrypted where they are from, and would be stored in "
                "clear. Add --in-clear if that is meant; copy_agent_sessions goes from "
                "one encrypted backend to another."
            )
        owner = self.owners.of(session)
        target = Target(
            self.backend,
            self._batches,
            self.source.name,
            session,
            owner,
            dry_run=self.dry_run,
        )
        if target.lines:
            # What can't go on is found before anything is written.
            marks = {name: line.mark for name, line in target.lines.items()}
            target.check(self.source.grown(session, marks))
        pages = [
            (branch, self.source.items(session, branch, target.mark_of(branch.name)))
            for branch in session.branches
        ]
        complete = target.complete
        if self.progress is not None:
            self.progress(sum(line.mark.count for line in target.lines.values()))
        target.make()
        items = branches = 0
        for branch, own in pages:
            branches += branch.name not in target.lines
            target.line(branch)
            items += sum(self._write(target, branch, page) for page in own if page)
        runs = write_runs(target)
        if not complete or items or branches or runs:
            target.finish()
        self._count(target, session, items, branches, runs)

    def _write(
        self, target: Target, branch: SourceBranch, items: list[SourceItem]
    ) -> int:
        page = encode_page(items)
        target.write(branch.name, items, page)
        self.report.unreadable += page.verbatim
        self.report.items += len(items)
        if self.progress is not None:
            self.progress(len(items))
        return len(items)

    def _count(
        self,
        target: Target,
        session: SourceSession,
        items: int,
        branches: int,
        runs: int,
    ) -> None:
        report = self.report
        report.branches += branches
        report.runs += runs
        report.left_out += session.left_out
        if target.is_new:
            report.made += 1
        elif items or branches or runs:
            report.grown += 1
        else:
            report.unchanged += 1
