"""The import itself: sessions one after the other, those refused left aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, tzinfo
from typing import Any

from django.db import connections, transaction
from django.db.models import F, Max, Min, Q

from agent_sessions.backends import run_rows
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.reports import guarded
from agent_sessions.transfer import Report
from agent_sessions.transfer.import_.advanced import AdvancedSource
from agent_sessions.transfer.import_.databases import open_database
from agent_sessions.transfer.import_.export_file import ExportSource
from agent_sessions.transfer.import_.owners import Owners
from agent_sessions.transfer.import_.records import (
    PAGE_BYTES,
    ImportProblem,
    Source,
    SourceRun,
    SourceSession,
    UnreadableSource,
    check_session,
)
from agent_sessions.transfer.import_.tables import (
    DjangoSource,
    SQLAlchemySource,
    TableSource,
)
from agent_sessions.transfer.import_.target import Target
from agent_sessions.usage import COUNTERS

KINDS = {
    "sqlite": "the SDK's SQLiteSession and AsyncSQLiteSession",
    "advanced-sqlite": "the SDK's AdvancedSQLiteSession",
    "sqlalchemy": "the SDK's SQLAlchemySession",
    "openai-django": "openai-django-sessions",
    "export": "our own export, agent-sessions/1",
}
_TABLES: dict[str, type[TableSource]] = {
    source.kind: source
    for source in (TableSource, AdvancedSource, SQLAlchemySource, DjangoSource)
}


def open_source(
    kind: str,
    place: str,
    *,
    sessions_table: str = "agent_sessions",
    messages_table: str = "agent_messages",
    zone: tzinfo | None = None,
    only: Sequence[str] = (),
) -> Source:
    """Open a source of one of KINDS: a file, or an alias of DATABASES.

    `zone` is that of times without an offset: UTC if none is given, and in our own
    export the project's TIME_ZONE. `only` names the sessions wanted. Raises
    UnreadableSource.
    """
    if kind == "export":
        return ExportSource(place, zone=zone, only=only)
    database = open_database(place)
    try:
        if kind == "advanced-sqlite" and database.vendor != "sqlite":
            raise UnreadableSource("AdvancedSQLiteSession has its tables in SQLite.")
        return _TABLES[kind](
            database,
            sessions_table=sessions_table,
            messages_table=messages_table,
            zone=zone or UTC,
            only=only,
        )
    except UnreadableSource:
        database.close()
        raise


class Batches(ExitStack):
    """Transactions that hold for about so many items, whichever sessions' they are.

    What the targets have got is written at a transaction's end, in few statements. An
    error rolls the last one back. A dry run has none.
    """

    def __init__(self, backend: DatabaseBackend, size: int, *, dry_run: bool) -> None:
        super().__init__()
        self.using = backend.using
        self.dry_run = dry_run
        # Grows with every transaction: who holds a lock sees when it is gone.
        self.number = 0
        self._statements = backend.engine.statements
        self._size = size
        self._left = 0
        self._targets: dict[int, Target] = {}
        self._items: list[tuple[Any, ...]] = []
        # Characters of these items, so that memory stays bounded.
        self._bytes = 0

    def begin(self) -> None:
        if self._left > 0 or self.dry_run:
            return
        self.number += 1
        self._left = self._size
        self.enter_context(transaction.atomic(self.using))
        self.push(lambda kind, *_: self.flush() if kind is None else None)
        # A transaction that reads before it writes loses its turn on SQLite.
        AgentSession.objects.using(self.using).filter(pk=0).update(item_count=0)

    def count(self, items: int) -> None:
        """Count what was written, and commit when it is enough."""
        self._left -= items
        if self._left <= 0:
            self.close()

    def add(self, target: Target, branch: Branch | None, rows: Sequence[Any]) -> None:
        """Write a target at the transaction's end, with new rows of a branch."""
        if not self.dry_run:
            self._targets[id(target)] = target
            self._items += ((branch, *row) for row in rows)
            self._bytes += sum(len(row[2]) for row in rows)
            if self._bytes > PAGE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what was added: sessions, branches and items, who is named first."""
        targets, self._targets = list(self._targets.values()), {}
        items, self._items, self._bytes = self._items, [], 0
        new = [target for target in targets if target.row._state.adding]
        self._insert([target.row for target in new])
        self._insert([target.changed.pop(0) for target in new if target.changed])
        for target in targets:
            target.save_branches()
        if items:
            rows = ((branch.pk, *row) for branch, *row in items)
            with connections[self.using].cursor() as cursor:
                self._statements.insert_rows(cursor, rows)
        for target in targets:
            target.save_row(is_new=target in new)
        if new:
            sessions = AgentSession.objects.using(self.using)
            sessions.bulk_update([target.row for target in new], ["branch"])

    def _insert(self, rows: Sequence[AgentSession | Branch]) -> None:
        if connections[self.using].features.can_return_rows_from_bulk_insert:
            for model in {type(row) for row in rows}:
                model._base_manager.using(self.using).bulk_create(rows)
        else:
            for row in rows:
                row.save(using=self.using)


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
    ) -> None:
        self.source = source
        self.backend = backend
        self.owners = owners
        # Whether what was encrypted elsewhere may be stored in clear.
        self.in_clear = False
        self.report = Report()
        self._batches = Batches(backend, batch_size, dry_run=dry_run)
        # Told how many items each page had.
        self.progress: Callable[[int], None] = lambda count: None

    @guarded
    def run(self, only: Sequence[str] = ()) -> Report:
        """Import everything that is new. Raises UnreadableSource.

        It may be run again after any end: it goes on where it stopped. The report
        names those of `only` that the source doesn't have.
        """
        missing = set(only)
        with self._batches:
            for session in self.source.sessions():
                missing.discard(session.session_id)
                try:
                    self._import(session)
                except ImportProblem as exc:
                    self.report.refuse(session.session_id, str(exc))
        for session_id in sorted(missing):
            self.report.refuse(session_id, "the source has no such session.")
        return self.report

    def _import(self, session: SourceSession) -> None:
        check_session(session)
        if session.opened and not self.in_clear:
            raise ImportProblem(
                "its items are encrypted where they are from, and would be stored in "
                "clear. Add --in-clear if that is meant; copy_agent_sessions goes from "
                "one encrypted backend to another."
            )
        target = Target(self.backend, self._batches, self.source.name, session)
        target.open(self.owners.of(session))
        # What can't go on is found before anything is written.
        has_more = target.is_new or target.compare(self.source)
        pages = [
            (branch, self.source.items(session, branch, target.count_of(branch.name)))
            for branch in session.branches
            if has_more
        ]
        self.progress(sum(known.count for known in target.branches.values()))
        before = self.report.items, len(target.branches)
        for branch, own in pages:
            target.open_branch(branch)
            for page in filter(None, own):
                target.write(branch.name, page)
                self.report.items += len(page)
                self.report.unreadable += sum(not item.is_readable for item in page)
                self.progress(len(page))
        branches = len(target.branches) - before[1]
        runs = write_runs(target)
        is_changed = bool(self.report.items - before[0] or branches or runs)
        if is_changed or not target.is_complete:
            target.finish()
        self.report.branches += branches
        self.report.runs += runs
        self.report.left_out += session.left_out
        if target.is_new:
            self.report.made += 1
        elif is_changed:
            self.report.grown += 1
        else:
            self.report.unchanged += 1


# -- runs ------------------------------------------------------------------------------


def write_runs(target: Target) -> int:
    """Write a session's runs that are new or have changed; tell how many."""
    runs = target.session.runs
    if not runs:
        return 0
    target.hold()
    if target.batches.dry_run and target.is_new:
        return len(runs)
    target.batches.flush()
    row = target.row
    here = run_rows.runs_of(target.using, row.pk)
    known = {run.run_id: run for run in here}
    turns = _read_turns(target)
    more = dict.fromkeys(COUNTERS, 0)
    new: list[AgentRun] = []
    changed: dict[int, dict[str, Any]] = {}
    for source in runs:
        columns = source.columns | _columns_of(source, target, turns)
        run = known.get(source.run_id)
        if run is None:
            new.append(AgentRun(session_id=row.pk, run_id=source.run_id, **columns))
        elif any(getattr(run, name) != value for name, value in columns.items()):
            changed[run.pk] = columns
        else:
            continue
        for name in COUNTERS:
            more[name] += columns.get(name, 0) - (getattr(run, name) if run else 0)
    if (new or changed) and not target.batches.dry_run:
        run_rows.copy(target.using, new)
        for pk, columns in changed.items():
            run_rows.write(here.filter(pk=pk), **columns)
        AgentSession.objects.using(target.using).filter(pk=row.pk).update(
            **{name: F(name) + value for name, value in more.items()}
        )
    return len(new) + len(changed)


# Columns of a run, by branch and number of its turn, and by branch and position of the
# message that opens the turn.
_Turns = dict[tuple[int, str, int], dict[str, Any]]


def _read_turns(target: Target) -> _Turns:
    """Find the turns of what was imported, and where they lie."""
    is_opening = Q(**OPENING)
    branches = [known.branch.pk for known in target.branches.values() if known.branch]
    rows = (
        SessionItem._base_manager.using(target.using)
        .filter(branch_id__in=branches)
        .values_list("branch_id", "turn")
        .annotate(
            first=Min("position"),
            last=Max("position"),
            opening=Min("pk", filter=is_opening),
            opened_at=Min("position", filter=is_opening),
        )
        .order_by()
    )
    turns: _Turns = {}
    for branch, number, first, last, opening, opened_at in rows:
        columns = {"turn": number, "turn_item": opening}
        if opened_at is not None:
            turns[branch, "opening", opened_at] = columns
        span = {"first_position": first, "last_position": last}
        turns[branch, "number", number] = columns | span
    return turns


def _columns_of(run: SourceRun, target: Target, turns: _Turns) -> dict[str, Any]:
    """Return the columns that say which items and turn a run was about."""
    known = target.branches.get(run.branch)
    if known is None or known.branch is None:
        return {}
    columns: dict[str, Any] = {"branch_id": known.branch.pk}
    if run.turn is not None:
        return columns | turns.get((known.branch.pk, "number", run.turn), {})
    if run.opening is not None:
        opened_on = target.branches.get(run.opening[0])
        if opened_on is not None and opened_on.branch is not None:
            place = (opened_on.branch.pk, "opening", run.opening[1])
            columns |= turns.get(place, {})
    return columns
