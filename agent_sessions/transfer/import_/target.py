"""The session that is being made: its row, its branches, and how far they are."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import connections
from django.db.models import F
from django.utils import timezone

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.times import day_of
from agent_sessions.transfer.export import MARKER
from agent_sessions.transfer.import_.batches import Batches, insert
from agent_sessions.transfer.import_.encoding import Page
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    Mark,
    SourceBranch,
    SourceItem,
    SourceSession,
    extend,
)


@dataclass(slots=True)
class Line:
    """A branch of the target: how far it was imported, and how it was left then."""

    branch: Branch | None
    mark: Mark = field(default_factory=Mark)
    head: int = 0
    turn: int = 0
    moved: bool = False


class Target:
    """One session of the target: found or made, then written page by page."""

    def __init__(
        self,
        backend: DatabaseBackend,
        batches: Batches,
        source_name: str,
        session: SourceSession,
        owner_id: Any,
        *,
        dry_run: bool = False,
    ) -> None:
        self.backend = backend
        self.using = backend.using
        self.batches = batches
        self.source_name = source_name
        self.session = session
        self.owner_id = owner_id
        self.dry_run = dry_run
        self.lines: dict[str, Line] = {}
        # Names of all branches that are here, imported or not.
        self._names: set[str] = set()
        self.row: AgentSession | None = None
        self._locked_in = -1
        self.hold()
        self.is_new = self.row is None

    # -- opening -------------------------------------------------------------------

    def hold(self) -> None:
        """Hold the session's row to the batch's end, and see that it is ours."""
        rows = AgentSession.objects.using(self.using).filter(
            backend=self.backend.alias, session_id=self.session.session_id
        )
        if not self.dry_run:
            self.batches.begin()
        if self._locked_in == self.batches.number:
            return
        if not self.dry_run:
            # A write: a transaction that reads first loses its turn on SQLite.
            rows.update(item_count=F("item_count"))
        row = rows.first()
        if row is None and self.row is not None:
            raise ImportProblem("it was deleted while it was being imported.")
        self._locked_in = self.batches.number
        self.row = row
        if row is not None:
            self._check_own(row)
            self._read_lines(row)

    def make(self) -> None:
        """Make the session's row where there is none; its marker says whose it is."""
        if self.row is not None or self.dry_run:
            return
        session = self.session
        created_at = session.created_at or timezone.now()
        updated_at = session.updated_at or created_at
        columns = dict(session.columns)
        metadata = {**columns.pop("metadata", {}), MARKER: self._marker(complete=False)}
        self.row = AgentSession.objects.using(self.using).create(
            backend=self.backend.alias,
            session_id=session.session_id,
            user_id=self.owner_id,
            created_at=created_at,
            updated_at=updated_at,
            active_on=day_of(updated_at),
            metadata=metadata,
            **columns,
        )

    def mark_of(self, name: str) -> Mark:
        """Return how far a branch has been imported."""
        return self.lines[name].mark if name in self.lines else Mark()

    def check(self, grown: Set[str]) -> None:
        """See that what the source has now fits what is here. Raises ImportProblem.

        `grown` names the branches that have got items since. Nothing is written before.
        """
        for source in self.session.branches:
            line = self.lines.get(source.name)
            if line is None:
                self._check_new(source)
            elif line.moved or line.branch is None:
                if source.name in grown:
                    raise _gone_on(source.name)
            elif line.branch.fork_position != source.fork_position:
                raise ImportProblem(
                    f"branch {source.name!r} begins elsewhere than when it was "
                    "imported. Delete the imported session and import again."
                )

    def _check_new(self, source: SourceBranch) -> None:
        if source.name in self._names:
            raise ImportProblem(
                f"its branch {source.name!r} is new in the source, and another of this "
                "name was made here. Delete the imported session and import again."
            )
        parent = self.lines.get(source.parent or "")
        if parent is not None and parent.branch is None:
            raise _gone_on(source.parent)

    @property
    def complete(self) -> bool:
        """Whether an import has come to the session's end before."""
        return self.row is not None and bool(self.row.metadata[MARKER]["complete"])

    def _check_own(self, row: AgentSession) -> None:
        marker = row.metadata.get(MARKER) if isinstance(row.metadata, dict) else None
        if not isinstance(marker, dict) or marker.get("source") != self.source_name:
            made = (
                f"it was imported from {marker.get('source')}"
                if isinstance(marker, dict)
                else "it wasn't made by an import"
            )
            raise ImportProblem(
                f"a session of this id is here already, and {made}. Delete it first, "
                "or import into another --backend."
            )
        came_from = marker.get("backend")
        if came_from and self.session.backend and came_from != self.session.backend:
            raise ImportProblem(
                f"a session of this id is here already, imported from the backend "
                f"{came_from!r}, and this one is of {self.session.backend!r}. Import it "
                "into another --backend."
            )
        if row.user_id != self.owner_id:
            raise ImportProblem(
                "it was imported for another owner. Name that owner, or delete the "
                "session first."
            )
        if holds_a_run(row):
            raise ImportProblem("a run is going on in it. Import when it has ended.")

    def _read_lines(self, row: AgentSession) -> None:
        branches = Branch._base_manager.using(self.using).filter(session_id=row.pk)
        found = {branch.name: branch for branch in branches}
        self._names = set(found)
        for name, known in row.metadata[MARKER]["branches"].items():
            # Without a hash, nothing can be proved: see Mark.
            pk, count, last, head, digest = [*known, ""][:5]
            branch = found.get(name)
            moved = branch is None or branch.pk != pk or branch.head != head
            turn = 0 if branch is None else branch.turn
            mark = Mark(count, last, digest)
            self.lines[name] = Line(branch, mark, head, turn, moved)

    # -- branches ------------------------------------------------------------------

    def line(self, source: SourceBranch) -> Line:
        """Find a branch or make it."""
        self.hold()
        line = self.lines.get(source.name)
        if line is None:
            line = self.lines[source.name] = self._new_line(source)
            # Known from here on, whatever happens to its items.
            self._update(None, 0, "")
        elif (
            line.branch is not None
            and not line.moved
            and line.branch.archived_at
            and not (source.archived or line.mark.count)
        ):
            # Its name alone had been taken; now it has something to show.
            line.branch.archived_at = None
            line.branch.save(using=self.using, update_fields=["archived_at"])
        return line

    def _new_line(self, source: SourceBranch) -> Line:
        fork = source.fork_position or 0
        if source.parent and fork > self._end_of(source.parent):
            raise ImportProblem(
                f"its branch {source.name!r} begins behind the end of "
                f"{source.parent!r}. Mend it in the source."
            )
        if self.dry_run or self.row is None:
            return Line(None, head=fork)
        parent = self.lines[source.parent].branch if source.parent else None
        turn = 0 if parent is None else self._turn_at(parent, fork)
        branch = Branch._base_manager.using(self.using).create(
            session_id=self.row.pk,
            name=source.name,
            parent=parent,
            fork_position=source.fork_position,
            head=fork,
            turn=turn,
            created_at=source.created_at or self.row.created_at,
            archived_at=timezone.now() if source.archived else None,
        )
        if self.row.branch_id is None:
            # What is there can be read before the session is complete.
            self.row.branch = branch
        return Line(branch, head=fork, turn=turn)

    def _end_of(self, name: str) -> int:
        """Return a branch's end in the source: no fork shows what it gets later."""
        told = [each.head or 0 for each in self.session.branches if each.name == name]
        return max(self.lines[name].head, *told)

    def _turn_at(self, parent: Branch, position: int) -> int:
        """Find the turn that a branch goes on from."""
        own = {
            line.branch.pk: line.branch for line in self.lines.values() if line.branch
        }
        # Lines of branches may be long.
        while parent.parent_id and position <= (parent.fork_position or 0):
            parent = own.get(parent.parent_id) or Branch._base_manager.using(
                self.using
            ).get(pk=parent.parent_id)
        turn: int | None = (
            SessionItem._base_manager.using(self.using)
            .filter(branch_id=parent.pk, position__lte=position)
            .order_by("-position")
            .values_list("turn", flat=True)
            .first()
        )
        return turn or 0

    # -- items ---------------------------------------------------------------------

    def write(self, name: str, items: Sequence[SourceItem], page: Page) -> None:
        """Write a page behind what its branch has, and how far it now is."""
        self.hold()
        line = self.lines[name]
        if line.moved:
            raise _gone_on(name)
        rows = self._item_rows(line, items, page)
        line.mark = Mark(
            line.mark.count + len(items), items[-1].id, extend(line.mark.digest, items)
        )
        if rows:
            line.head, line.turn = rows[-1][1:3]
        if self.dry_run or line.branch is None or self.row is None:
            return
        insert(self.using, rows)
        Branch._base_manager.using(self.using).filter(pk=line.branch.pk).update(
            head=line.head, turn=line.turn
        )
        title = page.batch.title if name == self.session.shown else ""
        self._update(items[-1].created_at, len(rows), title)
        self.batches.count(len(rows))

    def finish(self) -> None:
        """Say that the session is complete and which branch is its current one."""
        if self.dry_run or self.row is None:
            return
        self.hold()
        for source in self.session.branches:
            line = self.lines[source.name]
            head, turn = max(line.head, source.head or 0), line.turn
            if source.archived and source.turn is not None:
                # Of a branch that goes on, its items tell: an export is no snapshot.
                turn = source.turn
            if (
                line.branch
                and not line.moved
                and (head, turn) != (line.head, line.turn)
            ):
                line.head, line.turn = head, turn
                line.branch.head, line.branch.turn = line.head, line.turn
                line.branch.save(using=self.using, update_fields=["head", "turn"])
        if not self.complete:
            self.row.branch = self.lines[self.session.shown].branch
        self._update(self.session.updated_at, 0, "", complete=True)

    def _item_rows(
        self, line: Line, items: Sequence[SourceItem], page: Page
    ) -> list[tuple[Any, ...]]:
        adapt = connections[self.using].ops.adapt_datetimefield_value
        fallback = self.session.created_at or timezone.now()
        branch_id = None if line.branch is None else line.branch.pk
        position, rows = line.head, []
        for item, row in zip(items, page.batch.rows, strict=True):
            if item.position is not None and item.position <= position:
                raise ImportProblem(
                    "its items are not in the order of their positions."
                )
            position = item.position or position + 1
            rows.append(
                (
                    branch_id,
                    position,
                    line.turn + row.turn if item.turn is None else item.turn,
                    row.data,
                    row.type,
                    row.role,
                    row.call_id,
                    row.tool_name,
                    row.text,
                    len(row.data),
                    adapt(item.created_at or fallback),
                )
            )
        return rows

    def _update(
        self,
        latest: datetime | None,
        count: int,
        title: str,
        *,
        complete: bool = False,
    ) -> None:
        row = self.row
        if row is None:
            return
        row.metadata = {**row.metadata, MARKER: self._marker(complete=complete)}
        row.updated_at = max(row.updated_at, latest or row.updated_at)
        row.active_on = day_of(row.updated_at)
        row.item_count += count
        row.title = row.title or title
        row.save(
            using=self.using,
            update_fields=[
                "branch",
                "metadata",
                "updated_at",
                "active_on",
                "item_count",
                "title",
            ],
        )

    @property
    def _came_from(self) -> str | None:
        """Name the source's backend; a line without one says nothing new."""
        known = self.row.metadata.get(MARKER, {}) if self.row is not None else {}
        return known.get("backend") or self.session.backend

    def _marker(self, *, complete: bool) -> dict[str, Any]:
        return {
            "source": self.source_name,
            **({"backend": self._came_from} if self._came_from else {}),
            "complete": complete,
            "branches": {
                name: [
                    line.branch.pk,
                    line.mark.count,
                    line.mark.last,
                    line.head,
                    line.mark.digest,
                ]
                for name, line in self.lines.items()
                if line.branch is not None
            },
        }


def _gone_on(name: str | None) -> ImportProblem:
    return ImportProblem(
        f"its branch {name!r} has gone on here since it was imported, and in "
        "the source too. Delete the session here to have the source's."
    )
