"""The sessions that are being made: their rows, their branches, how far they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.lineage import read_pages
from agent_sessions.backends.leases import holds_a_run
from agent_sessions.items import first_line
from agent_sessions.items.kinds import is_opening
from agent_sessions.items.text import UNSEEN
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
)

if TYPE_CHECKING:
    from agent_sessions.transfer.import_ import Batches


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
    ) -> None:
        self.using = backend.using
        self.batches = batches
        self.session = session
        # Two backends may have a session of the same id.
        of = f" of the backend {session.backend!r}" if session.backend else ""
        self.origin = source_name + of
        self.row = AgentSession(backend=backend.alias, session_id=session.session_id)
        self.branches: dict[str, ImportedBranch] = {}
        # Those that aren't written yet, in their order.
        self.changed: list[Branch] = []
        self.is_new = True
        # Whether an import has come to the session's end before.
        self.is_complete = False
        self._current: Branch | None = None
        self._adapt_time = backend.engine.statements.adapt_time
        # Names of all branches that are here, imported or not.
        self._names: set[str] = set()
        self._held_in = -1

    # -- opening -------------------------------------------------------------------

    def open(self, owner_id: Any) -> None:
        """Find the session, or make its row. Raises ImportProblem if it isn't ours."""
        self.hold()
        if not self.is_new:
            self.is_complete = bool(self.row.metadata[MARKER]["complete"])
            if self.row.user_id != owner_id:
                raise ImportProblem(
                    "it was imported for another owner. Name that owner, or delete the "
                    "session first."
                )
            return
        self.row.user_id = owner_id
        self.row.created_at = self.session.created_at or timezone.now()
        self.row.updated_at = self.session.updated_at or self.row.created_at
        for name, value in self.session.columns.items():
            setattr(self.row, name, value)

    def hold(self) -> None:
        """Lock the session's row to the batch's end, and check that it is ours."""
        self.batches.begin()
        if self._held_in == self.batches.number:
            return
        rows = AgentSession.objects.using(self.using).filter(
            backend=self.row.backend, session_id=self.row.session_id
        )
        if not self.batches.dry_run:
            rows = rows.select_for_update()
        row = rows.first()
        if row is None and not self.row._state.adding:
            raise ImportProblem("it was deleted while it was being imported.")
        self._held_in = self.batches.number
        if row is not None:
            self.is_new = self.is_new and not self.row._state.adding
            self.row = row
            self._read_branches(self._check_own()["items"])

    def _check_own(self) -> dict[str, Any]:
        """Return what the import before has noted. Raises ImportProblem."""
        metadata = self.row.metadata
        marker = metadata.get(MARKER) if isinstance(metadata, dict) else None
        if not isinstance(marker, dict):
            made = "it wasn't made by an import"
        elif marker.get("source") != self.origin:
            made = f"it was imported from {marker.get('source')}"
        elif holds_a_run(self.row):
            raise ImportProblem("a run is going on in it. Import when it has ended.")
        else:
            return marker
        raise ImportProblem(
            f"a session of this id is here already, and {made}. Delete it first, or "
            "import into another --backend."
        )

    def _read_branches(self, counts: dict[str, int]) -> None:
        rows = Branch._base_manager.using(self.using).filter(session_id=self.row.pk)
        found = {branch.label: branch for branch in rows}
        self._names = set(found)
        for name, count in counts.items():
            branch, known = found.get(name), self.branches.get(name)
            before = known.branch if known else None
            if before and (branch is None or branch.head != before.head):
                raise _gone_on(name)
            self.branches[name] = ImportedBranch(branch, count)

    def count_of(self, name: str) -> int:
        return self.branches[name].count if name in self.branches else 0

    # -- what is here already --------------------------------------------------------

    def compare(self, source: Source) -> bool:
        """Check that the source has what was imported; return whether it has more.

        What both have got since can't be put together. Raises ImportProblem.
        """
        has_more = not self.is_complete
        names = {branch.name for branch in self.session.branches}
        for name, known in self.branches.items():
            if known.count and name not in names:
                raise _lost(name)
        # What comes before a break is imported, and told then.
        try:
            for branch in self.session.branches:
                here = self.branches.get(branch.name)
                row = here.branch if here else None
                if here is None:
                    self._check_new(branch)
                    has_more = True
                elif row and row.fork_position != branch.fork_position:
                    raise ImportProblem(
                        f"branch {branch.name!r} begins elsewhere than when it was "
                        "imported. Delete the imported session and import again."
                    )
                pages = source.items(self.session, branch)
                has_more |= self._compare_items(branch.name, here, pages)
        except BreaksOff:
            return True
        return has_more

    def _compare_items(
        self, name: str, known: ImportedBranch | None, pages: Iterator[list[SourceItem]]
    ) -> bool:
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
                elif item.position not in {None, position} or text != item.row.data:
                    raise ImportProblem(
                        f"the items of branch {name!r} that were imported before are "
                        "others in the source now: they were changed there or here, or "
                        "it is another conversation of this id. Delete the imported "
                        "session and import again, or import into another --backend."
                    )
            left -= len(before)
            count += len(page)
        if left:
            raise _lost(name)
        has_grown = known is not None and count > known.count
        if has_grown and (is_changed_here or next(here, None) is not None):
            raise _gone_on(name)
        return has_grown

    def _read_texts(self, branch: Branch) -> Iterator[tuple[int, str]]:
        rows = SessionItem._base_manager.using(self.using).filter(branch_id=branch.pk)
        for page in read_pages(rows, ("position", "data"), PAGE_ROWS):
            yield from page

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

    def open_branch(self, source: SourceBranch) -> None:
        """Make a branch that isn't here."""
        self.hold()
        if source.name in self.branches:
            return
        branch = self._new_branch(source)
        self.branches[source.name] = ImportedBranch(branch)
        # What is there can be read before the session is complete.
        if self.row.branch_id is None:
            self._current = self._current or branch
        self._change(branch)

    def _new_branch(self, source: SourceBranch) -> Branch:
        fork = source.fork_position or 0
        if source.parent and fork > self._end_of(source.parent):
            raise ImportProblem(
                f"its branch {source.name!r} begins behind the end of "
                f"{source.parent!r}. Mend it in the source."
            )
        parent = self.branches[source.parent].branch if source.parent else None
        return Branch(
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

    def _end_of(self, name: str) -> int:
        """Return a branch's end in the source: no fork shows what it gets later."""
        branch = self.branches[name].branch
        told = [each.head for each in self.session.branches if each.name == name]
        return max(branch.head if branch else 0, *told)

    def _turn_at(self, parent: Branch, position: int) -> int:
        """Find the turn that a branch goes on from."""
        if not position or self.batches.dry_run:
            return 0
        self.batches.flush()
        rows = SessionItem._base_manager.using(self.using).order_by("-position")
        shown: Branch | None = parent
        while shown is not None:
            # A branch may end behind its fork without items of its own.
            begin = shown.fork_position or 0
            own = rows.filter(branch_id=shown.pk, position__gt=begin)
            found = own.filter(position__lte=position).values_list("turn", flat=True)
            if (turn := found.first()) is not None:
                return int(turn)
            position, shown = min(position, begin), shown.parent
        return 0

    def write(self, name: str, items: Sequence[SourceItem]) -> None:
        """Write a page behind what its branch has."""
        self.hold()
        known = self.branches[name]
        branch = known.branch
        if branch is None:
            raise _gone_on(name)
        fallback = self.session.created_at or timezone.now()
        is_shown = name == self.session.shown
        rows: list[tuple[Any, ...]] = []
        head, turn = branch.head, branch.turn
        for item in items:
            data, _, *drawn = item.row
            if item.position is not None and item.position <= head:
                raise ImportProblem(
                    "its items are not in the order of their positions."
                )
            head = item.position or head + 1
            opens = is_opening(item.row.type, item.row.role)
            turn = turn + opens if item.turn is None else item.turn
            created_at = self._adapt_time(item.created_at or fallback)
            rows.append((head, turn, data, *drawn, len(data), created_at))
            if opens and is_shown and self.row.title in {"", UNSEEN}:
                self.row.title = first_line(item.row.text)
        known.count += len(rows)
        branch.head, branch.turn = head, turn
        self.row.item_count += len(rows)
        self._used(items[-1].created_at)
        self._change(branch, rows)
        self.batches.count(len(rows))

    def finish(self) -> None:
        """Store that the session is complete, and its current branch."""
        self.hold()
        for source in self.session.branches:
            branch = self.branches[source.name].branch
            if branch is not None and source.head > branch.head:
                branch.head = source.head
                self._change(branch)
        if not self.is_complete:
            self._current = self.branches[self.session.shown].branch
        self.is_complete = True
        self._used(self.session.updated_at)
        self._change()
        # Sessions without items fill a batch too.
        self.batches.count(1)

    def save_branches(self) -> None:
        for branch in self.changed:
            old = None if branch._state.adding else ("head", "turn")
            branch.save(using=self.using, update_fields=old)
        self.changed = []

    def save_row(self, *, is_new: bool) -> None:
        """Store which branch is current, in a row that existed before."""
        if self._current is not None:
            self.row.branch = self._current
        if not is_new:
            columns = ("metadata", "updated_at", "active_on", "item_count", "title")
            self.row.save(using=self.using, update_fields=("branch", *columns))

    def _used(self, when: datetime | None) -> None:
        self.row.updated_at = max(self.row.updated_at, when or self.row.updated_at)
        self.row.active_on = day_of(self.row.updated_at)

    def _change(self, branch: Branch | None = None, rows: Sequence[Any] = ()) -> None:
        """Write the session at the batch's end, with the counts of a branch."""
        if branch is not None and not any(branch is each for each in self.changed):
            self.changed.append(branch)
        counts = {name: known.count for name, known in self.branches.items()}
        # What the next import has to know.
        marker = {"source": self.origin, "complete": self.is_complete, "items": counts}
        self.row.metadata = {**self.row.metadata, MARKER: marker}
        self.batches.add(self, branch, rows)


def _lost(name: str) -> ImportProblem:
    return ImportProblem(
        f"the source no longer has all items of branch {name!r} that were imported "
        "before. Delete the imported session and import again."
    )


def _gone_on(name: str | None) -> ImportProblem:
    return ImportProblem(
        f"its branch {name!r} has gone on here since it was imported, and in "
        "the source too. Delete the session here to have the source's."
    )
