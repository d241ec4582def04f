"""Read a session for someone who looks at it: its branches, a page, its runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from django.db.models import OuterRef, Subquery

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import Segment
from agent_sessions.backends.database.reading import read_page
from agent_sessions.handler import sessions
from agent_sessions.items import StoredItem
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem

# Branches that the switcher offers: the newest.
BRANCHES = 100
# Runs that one page of items names.
RUNS = 200
# How far back the call of an output is looked for: ids have no index.
NEAR = 1_000
_RUN_COLUMNS = (
    "session",
    "run_id",
    "branch",
    "agent_name",
    "model",
    "status",
    "started_at",
    "finished_at",
    "first_position",
    "last_position",
    "input_tokens",
    "output_tokens",
    "error_code",
)


@dataclass(frozen=True, slots=True)
class BranchChoice:
    """A branch to look at; an archived one is what an undo or compaction replaced."""

    name: str
    created_at: datetime
    archived_at: datetime | None
    is_current: bool


class History:
    """One session's history, on its current branch or on the one that is named.

    Its methods raise AgentSessionError where the store can't be read.
    """

    def __init__(self, row: AgentSession, branch: str = "") -> None:
        self.row = row
        self._wanted = branch

    @cached_property
    def backend(self) -> BaseSessionBackend:
        return sessions[self.row.backend]

    @cached_property
    def branches(self) -> list[BranchChoice]:
        """The branches that have something to show, newest first."""
        if (backend := self.backend.in_database) is None:
            return []
        first = (
            SessionItem.objects.filter(branch=OuterRef("pk"))
            .order_by("position")
            .values("position")[:1]
        )
        # The doctor's quarantine holds rows, not histories.
        rows: Any = (
            Branch.objects.using(backend.using)
            .filter(session_id=self.row.pk, is_quarantine=False)
            .annotate(first=Subquery(first))
        )
        found = list(rows.order_by("-pk")[:BRANCHES])
        if self._wanted and len(found) == BRANCHES:
            # One that was asked for is there, however old.
            older = rows.filter(pk__lt=found[-1].pk)
            found += older.filter(**Branch.of_label(self._wanted))
        family = {branch.pk: branch for branch in found}
        return [
            BranchChoice(
                branch.label,
                branch.created_at,
                branch.archived_at,
                branch.pk == self.row.branch_id,
            )
            for branch in found
            if branch.archived_at is None or _shows(branch, family)
        ]

    @cached_property
    def chosen(self) -> BranchChoice | None:
        """The branch that is shown, where it is not the session's current one."""
        if not self._wanted:
            return None
        found = (b for b in self.branches if b.name == self._wanted)
        return next((b for b in found if not b.is_current), None)

    def page(
        self, *, before: int | None = None, after: int | None = None, limit: int
    ) -> Page:
        """Read a stretch of the history, oldest first."""
        backend, name = self.backend, self.chosen
        if name is not None and (rows := backend.in_database) is not None:
            return rows.ask(
                self._key,
                lambda branches: read_page(
                    _named(branches, name), before=before, after=after, limit=limit
                ),
            )
        return backend.page(self._key, before=before, after=after, limit=limit)

    def item(self, position: int) -> StoredItem | None:
        """Read one item; None where there is none in that place."""
        items = self.page(before=position + 1, limit=1).items
        return items[0] if items and items[0].position == position else None

    def calls(self, call_ids: Collection[str], before: int) -> dict[str, int]:
        """Find the positions of calls that lie not far before a position."""
        backend, name = self.backend.in_database, self.chosen
        if not call_ids or backend is None:
            return {}

        def find(branches: Branches) -> dict[str, int]:
            branch = _named(branches, name).current()
            if branch is None:
                return {}
            rows = branches.items(branch).filter(
                position__lt=before,
                position__gte=before - NEAR,
                call_id__in=call_ids,
                type__endswith="_call",
            )
            return dict(rows.values_list("call_id", "position"))

        return backend.ask(self._key, find)

    def runs(self, first: int, last: int) -> list[AgentRun]:
        """Find the runs that wrote items between two positions, oldest first."""
        found = (
            AgentRun.objects.using(self.row._state.db)
            .filter(
                session_id=self.row.pk,
                first_position__lte=last,
                last_position__gte=first,
            )
            .only(*_RUN_COLUMNS)
            .order_by("first_position", "pk")[:RUNS]
        )
        backend, name = self.backend.in_database, self.chosen
        if backend is None:
            return list(found)
        # Branches count on from their forks, so positions alone don't tell.
        segments = backend.ask(
            self._key, lambda branches: _segments(_named(branches, name))
        )
        return [run for run in found if _wrote(run, segments)]

    @property
    def _key(self) -> SessionKey:
        return SessionKey(self.row.session_id, self.row.user_id)


class _Named(Branches):
    """The branches of a session, one of which is taken for the current one."""

    def __init__(self, branches: Branches, choice: BranchChoice) -> None:
        super().__init__(branches.directory, branches.key)
        self._choice = choice

    def current(self) -> Branch | None:
        if self._choice.archived_at is not None:
            return self.archived(self._choice.name)
        return self.named(self._choice.name)


def _named(branches: Branches, choice: BranchChoice | None) -> Branches:
    return branches if choice is None else _Named(branches, choice)


def _segments(branches: Branches) -> tuple[Segment, ...]:
    branch = branches.current()
    return () if branch is None else branches.segments(branch)


def _wrote(run: AgentRun, segments: tuple[Segment, ...]) -> bool:
    """Return whether something that a run wrote is in the segments."""
    return any(
        segment.branch_id == run.branch_id
        and any(
            position is not None and segment.holds(position)
            for position in (run.first_position, run.last_position)
        )
        for segment in segments
    )


def _shows(branch: Any, family: Mapping[int, Any], upto: float = float("inf")) -> bool:
    """Return whether a branch or what it grew from has items up to a position."""
    while branch is not None:
        if branch.first is not None and branch.first <= upto:
            return True
        upto = min(upto, branch.fork_position or 0)
        if not upto:
            return False
        branch = family.get(branch.parent_id)
    # The parent is older than what was looked at.
    return True
