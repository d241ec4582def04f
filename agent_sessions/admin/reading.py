"""Read a session for someone who looks at it: its branches, a page, its runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

from django.db.models import OuterRef, Subquery

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.history import read_page
from agent_sessions.exceptions import BranchDoesNotExist
from agent_sessions.handler import sessions
from agent_sessions.items import StoredItem
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem

# Branches that the switcher offers: the newest.
BRANCHES = 100
# Runs that one page of items names.
RUNS = 200
# Runs before a page that may reach into it, on one branch or another.
BEFORE = 20
# How far back the call of an output is looked for: ids have no index.
NEAR = 1_000

T = TypeVar("T")


class History:
    """One session's history, on its current branch or on the one that is named.

    Its methods raise AgentSessionError where the store can't be read.
    """

    def __init__(self, row: AgentSession, branch: str = "") -> None:
        self.row = row
        self._wanted = branch
        self._key = SessionKey(row.session_id, row.user_id)

    @cached_property
    def backend(self) -> BaseSessionBackend:
        return sessions[self.row.backend]

    @cached_property
    def branches(self) -> list[Branch]:
        """The branches that have something to show, newest first."""
        if (backend := self.backend.in_database) is None:
            return []
        first = SessionItem.objects.filter(branch=OuterRef("pk")).order_by("position")
        # The doctor's quarantine holds rows, not histories.
        rows: Any = (
            Branch.objects.using(backend.using)
            .filter(session_id=self.row.pk, is_quarantine=False)
            .annotate(first=Subquery(first.values("position")[:1]))
        )
        found = list(rows.order_by("-pk")[:BRANCHES])
        if self._wanted and len(found) == BRANCHES:
            # One that was asked for is there, however old.
            older = rows.filter(pk__lt=found[-1].pk)
            found += older.filter(**Branch.of_label(self._wanted))
        family = {branch.pk: branch for branch in found}
        return [
            branch
            for branch in found
            if branch.archived_at is None or _shows(branch, family)
        ]

    @cached_property
    def chosen(self) -> Branch | None:
        """The branch that is shown, where it is not the session's current one."""
        if not self._wanted:
            return None
        found = (each for each in self.branches if each.label == self._wanted)
        return next((each for each in found if each.pk != self.row.branch_id), None)

    def page(
        self, *, before: int | None = None, after: int | None = None, limit: int
    ) -> Page:
        """Read a stretch of the history, oldest first."""
        if self.chosen is None:
            return self.backend.page(self._key, before=before, after=after, limit=limit)
        read = partial(read_page, before=before, after=after, limit=limit)
        return self._ask(read, Page([], False))

    def item(self, position: int) -> StoredItem | None:
        """Return the item at a position, or None."""
        items = self.page(before=position + 1, limit=1).items
        return items[0] if items and items[0].position == position else None

    def calls(self, call_ids: Collection[str], before: int) -> dict[str, int]:
        """Find the positions of calls that lie not far before a position."""

        def find(branches: Branches) -> dict[str, int]:
            branch = branches.current()
            if branch is None:
                return {}
            near = {"after": before - NEAR - 1, "upto": before - 1}
            rows = branches.items(branch, **near).filter(
                call_id__in=call_ids, type__endswith="_call"
            )
            return dict(rows.values_list("call_id", "position"))

        return self._ask(find, {}) if call_ids else {}

    def runs(self, first: int, last: int) -> list[AgentRun]:
        """Find the runs that wrote items between two positions, oldest first."""
        rows = (
            AgentRun._base_manager.using(self.row._state.db)
            .filter(session_id=self.row.pk)
            .defer("state", "usage", "message_ids")
        )
        # Two ranges of an index: those that begin here, and the last ones before.
        here = rows.filter(first_position__range=(first, last))
        before = rows.filter(first_position__lt=first).order_by("-first_position")
        found = [run for run in before[:BEFORE] if (run.last_position or 0) >= first]
        found += here.order_by("first_position", "pk")[:RUNS]
        found.sort(key=lambda run: (run.first_position or 0, run.pk))

        current = (each for each in self.branches if each.pk == self.row.branch_id)
        shown = self.chosen or next(current, None)
        if shown is not None and shown.parent_id is None:
            return [run for run in found if run.branch_id == shown.pk]

        def written(branches: Branches) -> list[AgentRun]:
            # Branches count on from their forks, so positions alone don't tell.
            branch = branches.current()
            segments = () if branch is None else branches.segments(branch)
            return [
                run
                for run in found
                if any(
                    segment.branch_id == run.branch_id
                    # They are numbers, as the query has compared them.
                    and (
                        segment.holds(run.first_position or 0)
                        or segment.holds(run.last_position or 0)
                    )
                    for segment in segments
                )
            ]

        return self._ask(written, found)

    def _ask(self, question: Callable[[Branches], T], otherwise: T) -> T:
        """Ask the session's rows on the branch that is shown; other stores have none."""
        backend, chosen = self.backend.in_database, self.chosen
        if backend is None:
            return otherwise
        if chosen is None:
            return backend.ask(self._key, question)
        using = partial(_on, chosen.pk, question)
        try:
            return backend.ask(self._key, using)
        except Branch.DoesNotExist:
            # The session was deleted meanwhile.
            name = chosen.label
            raise BranchDoesNotExist(self.row.session_id, name) from None


def _on(branch: int, question: Callable[[Branches], T], branches: Branches) -> T:
    """Ask with another branch than the session's own for the current one."""
    return question(Branches(branches.directory, branches.key, branch))


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
