"""The session that is being made: its row, its branches, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import connections, transaction
from django.db.models import F
from django.utils import timezone

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.times import day_of
from agent_sessions.transfer.export import MARKER
from agent_sessions.transfer.import_.records import (
    PAGE_ROWS,
    BreaksOff,
    ImportProblem,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
    encode_items,
    stored_text,
)


class Batches(ExitStack):
    """Transactions that hold for about so many items, whichever sessions' they are.

    What is left is committed at the block's end; an error rolls the last batch back.
    """

    def __init__(self, using: str, size: int) -> None:
        super().__init__()
        self.using = using
        self.size = size
        # Grows with every transaction: who holds a lock sees when it is gone.
        self.number = 0
        self._left = 0

    def begin(self) -> None:
        """Open a transaction where none is open."""
        if self._left <= 0:
            self.number += 1
            self._left = self.size
            self.enter_context(transaction.atomic(self.using))

    def count(self, items: int) -> None:
        """Count what was written, and commit when it is enough."""
        self._left -= items
        if self._left <= 0:
            self.close()


@dataclass(slots=True)
class ImportedBranch:
    """A branch of the target, and how many of its items imports have written."""

    # None where it was removed here.
    branch: Branch | None
    count: int = 0


class Target:
    """One session of the target: found or made, then written page by page."""

    def __init__(
        self,
        backend: DatabaseBackend,
        batches: Batches,
        source_name: str,
        session: SourceSession,
        *,
        dry_run: bool = False,
    ) -> None:
        self.backend = backend
        self.alias = backend.alias
        self.using = backend.using
        self.batches = batches
        self.session = session
        self.dry_run = dry_run
        # Two backends may have a session of the same id.
        of = f" of the backend {session.backend!r}" if session.backend else ""
        self.origin = source_name + of
        self.branches: dict[str, ImportedBranch] = {}
        # Names of all branches that are here, imported or not.
        self._names: set[str] = set()
        self.row: AgentSession | None = None
        self.is_new = True
        # Whether an import has come to the session's end before.
        self.is_complete = False
        self._held_in = -1

    # -- opening -------------------------------------------------------------------

    def open(self, owner_id: Any) -> None:
        """Find the session, if it is here. Raises ImportProblem if it isn't ours."""
        self.hold()
        if self.row is None:
            return
        self.is_new = False
        self.is_complete = bool(self.row.metadata[MARKER]["complete"])
        if self.row.user_id != owner_id:
            raise ImportProblem(
                "it was imported for another owner. Name that owner, or delete the "
                "session first."
            )

    def hold(self) -> None:
        """Hold the session's row to the batch's end, and see that it is ours."""
        rows = AgentSession.objects.using(self.using).filter(
            backend=self.alias, session_id=self.session.session_id
        )
        if not self.dry_run:
            self.batches.begin()
        if self._held_in == self.batches.number:
            return
        if not self.dry_run:
            # A write: a transaction that reads first loses its turn on SQLite.
            rows.update(item_count=F("item_count"))
        row = rows.first()
        if row is None and self.row is not None:
            raise ImportProblem("it was deleted while it was being imported.")
        self._held_in, self.row = self.batches.number, row
        if row is not None:
            self._read_branches(row, self._check_own(row)["items"])

    def _check_own(self, row: AgentSession) -> dict[str, Any]:
        """Return what the import before has noted. Raises ImportProblem."""
        marker = row.metadata.get(MARKER) if isinstance(row.metadata, dict) else None
        if not isinstance(marker, dict):
            made = "it wasn't made by an import"
        elif marker.get("source") != self.origin:
            made = f"it was imported from {marker.get('source')}"
        elif holds_a_run(row):
            raise ImportProblem("a run is going on in it. Import when it has ended.")
        else:
            return marker
        raise ImportProblem(
            f"a session of this id is here already, and {made}. Delete it first, or "
            "import into another --backend."
        )

    def _read_branches(self, row: AgentSession, counts: dict[str, int]) -> None:
        rows = Branch._base_manager.using(self.using).filter(session_id=row.pk)
        found = {branch.label: branch for branch in rows}
        self._names = set(found)
        for name, count in counts.items():
            branch, known = found.get(name), self.branches.get(name)
            before = known.branch if known else None
            if before and (branch is None or branch.head != before.head):
                raise _gone_on(name)
            self.branches[name] = ImportedBranch(branch, count)

    def count_of(self, name: str) -> int:
        """Return how many items of a branch were imported."""
        return self.branches[name].count if name in self.branches else 0

    # -- what is here already --------------------------------------------------------

    def compare(self, source: Source) -> None:
        """See that what was imported is what the source has. Raises ImportProblem.

        What both have got since can't be put together either.
        """
        if self.row is None:
            return
        # What comes before a break is imported, and told then.
        with suppress(BreaksOff):
            for branch in self.session.branches:
                known = self.branches.get(branch.name)
                if known is None:
                    self._check_new(branch)
                elif known.branch and known.branch.fork_position != (
                    branch.fork_position
                ):
                    raise ImportProblem(
                        f"branch {branch.name!r} begins elsewhere than when it was "
                        "imported. Delete the imported session and import again."
                    )
                self._compare_items(
                    branch.name, known, source.items(self.session, branch)
                )

    def _compare_items(
        self, name: str, known: ImportedBranch | None, pages: Iterator[list[SourceItem]]
    ) -> None:
        branch = known.branch if known else None
        here = self._read_texts(branch) if branch else iter(())
        count, left = 0, known.count if known else 0
        is_changed_here = known is not None and branch is None
        for page in pages:
            before = page[:left]
            for item in before:
                position, text = next(here, (None, ""))
                if position is None:
                    is_changed_here = True
                elif item.position not in {None, position} or (
                    text != item.data and text != stored_text(item.data)
                ):
                    raise ImportProblem(
                        f"the items of branch {name!r} that were imported before are "
                        "others in the source now: they were changed there or here, or "
                        "it is another conversation of this id. Delete the imported "
                        "session and import again, or import into another --backend."
                    )
            left -= len(before)
            count += len(page)
        if left:
            raise ImportProblem(
                f"the source no longer has all items of branch {name!r} that were "
                "imported before. Delete the imported session and import again."
            )
        has_grown = known is not None and count > known.count
        if has_grown and (is_changed_here or next(here, None) is not None):
            raise _gone_on(name)

    def _read_texts(self, branch: Branch) -> Iterator[tuple[int, str]]:
        """Read the places and texts of a branch's own items, a page at a time."""
        rows = SessionItem._base_manager.using(self.using).filter(branch_id=branch.pk)
        last = -1
        while True:
            found = rows.filter(position__gt=last).order_by("position")
            page = list(found.values_list("position", "data")[:PAGE_ROWS])
            yield from page
            if len(page) < PAGE_ROWS:
                return
            last = page[-1][0]

    def _check_new(self, source: SourceBranch) -> None:
        if source.name in self._names:
            raise ImportProblem(
                f"its branch {source.name!r} is new in the source, and another of this "
                "name was made here. Delete the imported session and import again."
            )
        parent = self.branches.get(source.parent or "")
        if parent is not None and parent.branch is None:
            raise _gone_on(source.parent)

    # -- writing -------------------------------------------------------------------

    def make(self, owner_id: Any) -> None:
        """Make the session's row where there is none; its marker says whose it is."""
        if self.row is not None or self.dry_run:
            return
        session = self.session
        created_at = session.created_at or timezone.now()
        updated_at = session.updated_at or created_at
        columns = dict(session.columns)
        metadata = {**columns.pop("metadata", {}), MARKER: self._marker()}
        self.row = AgentSession.objects.using(self.using).create(
            backend=self.alias,
            session_id=session.session_id,
            user_id=owner_id,
            created_at=created_at,
            updated_at=updated_at,
            active_on=day_of(updated_at),
            metadata=metadata,
            **columns,
        )

    def open_branch(self, source: SourceBranch) -> None:
        """Make a branch that isn't here; show one that has got items."""
        self.hold()
        known = self.branches.get(source.name)
        if known is None:
            self.branches[source.name] = self._new_branch(source)
            # Known from here on, whatever happens to its items.
            self._update(None, 0, "")
        elif known.branch is not None and not (known.count or source.archived):
            known.branch.archived_at = None
            self._save(known.branch, "archived_at")

    def _new_branch(self, source: SourceBranch) -> ImportedBranch:
        fork = source.fork_position or 0
        if source.parent and fork > self._end_of(source.parent):
            raise ImportProblem(
                f"its branch {source.name!r} begins behind the end of "
                f"{source.parent!r}. Mend it in the source."
            )
        parent = self.branches[source.parent].branch if source.parent else None
        branch = Branch(
            session=self.row,
            **Branch.of_label(source.name),
            parent=parent,
            fork_position=source.fork_position,
            head=fork,
            turn=0 if parent is None else self._turn_at(parent, fork),
            created_at=source.created_at or self.session.created_at or timezone.now(),
            archived_at=timezone.now() if source.archived else None,
            is_quarantine=source.quarantine,
        )
        self._save(branch)
        if self.row is not None and self.row.branch_id is None:
            # What is there can be read before the session is complete.
            self.row.branch = branch
        return ImportedBranch(branch)

    def _end_of(self, name: str) -> int:
        """Return a branch's end in the source: no fork shows what it gets later."""
        branch = self.branches[name].branch
        told = [each.head for each in self.session.branches if each.name == name]
        return max(branch.head if branch else 0, *told)

    def _turn_at(self, parent: Branch, position: int) -> int:
        """Find the turn that a branch goes on from."""
        if not position or self.dry_run:
            return 0
        while parent.parent is not None and position <= (parent.fork_position or 0):
            parent = parent.parent
        rows = SessionItem._base_manager.using(self.using).filter(
            branch_id=parent.pk, position__lte=position
        )
        turns = rows.order_by("-position").values_list("turn", flat=True)
        return turns.first() or 0

    def write(self, name: str, items: Sequence[SourceItem]) -> int:
        """Write a page behind what its branch has; tell how many can't be read."""
        self.hold()
        known = self.branches[name]
        branch = known.branch
        if branch is None:
            raise _gone_on(name)
        encoded, title, unreadable = encode_items(items)
        statements = self.backend.engine.statements
        fallback = self.session.created_at or timezone.now()
        rows: list[tuple[Any, ...]] = []
        head, turn = branch.head, branch.turn
        for item, row in zip(items, encoded, strict=True):
            if item.position is not None and item.position <= head:
                raise ImportProblem(
                    "its items are not in the order of their positions."
                )
            head = item.position or head + 1
            turn = branch.turn + row.turn if item.turn is None else item.turn
            created_at = statements.adapt_time(item.created_at or fallback)
            size = len(row.data)
            rows.append((branch.pk, head, turn, row[0], *row[2:], size, created_at))
        known.count += len(rows)
        branch.head, branch.turn = head, turn
        if self.dry_run:
            return unreadable
        with connections[self.using].cursor() as cursor:
            statements.insert_rows(cursor, rows)
        self._save(branch, "head", "turn")
        shown = name == self.session.shown
        self._update(items[-1].created_at, len(rows), title if shown else "")
        self.batches.count(len(rows))
        return unreadable

    def finish(self) -> None:
        """Say that the session is complete and which branch is its current one."""
        self.hold()
        if self.dry_run or self.row is None:
            return
        for source in self.session.branches:
            branch = self.branches[source.name].branch
            if branch is not None and source.head > branch.head:
                branch.head = source.head
                self._save(branch, "head")
        if not self.is_complete:
            self.row.branch = self.branches[self.session.shown].branch
        self.is_complete = True
        self._update(self.session.updated_at, 0, "")

    def _save(self, branch: Branch, *columns: str) -> None:
        if not self.dry_run:
            branch.save(using=self.using, update_fields=columns or None)

    def _update(self, latest: datetime | None, count: int, title: str) -> None:
        row = self.row
        if row is None or self.dry_run:
            return
        row.metadata = {**row.metadata, MARKER: self._marker()}
        row.updated_at = max(row.updated_at, latest or row.updated_at)
        row.active_on = day_of(row.updated_at)
        row.item_count += count
        row.title = row.title or title
        changed = ["branch", "metadata", "updated_at", "active_on", "item_count"]
        row.save(using=self.using, update_fields=[*changed, "title"])

    def _marker(self) -> dict[str, Any]:
        """Return what the next import has to know."""
        counts = {name: known.count for name, known in self.branches.items()}
        return {"source": self.origin, "complete": self.is_complete, "items": counts}


def _gone_on(name: str | None) -> ImportProblem:
    return ImportProblem(
        f"its branch {name!r} has gone on here since it was imported, and in "
        "the source too. Delete the session here to have the source's."
    )
