"""Branches without copies: a fork is a row, reading it walks its lineage."""

from __future__ import annotations

import time
from typing import Any

from django.db.models import F, Max
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.lineage import (
    Lineages,
    Segment,
    first_of_turn,
    segment_of,
    visible,
)
from agent_sessions.backends.directory import Directory
from agent_sessions.backends.keys import check_branch
from agent_sessions.exceptions import BranchDoesNotExist, InvalidBranch
from agent_sessions.models import (
    LABEL_MARK,
    MAIN_BRANCH,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.times import iso

NAME_LENGTH = 255


def check_turn(turn: object) -> None:
    if isinstance(turn, bool) or not isinstance(turn, int):
        raise InvalidBranch(f"A turn is a whole number, not {turn!r}.")


def next_version(branch: Branch) -> int:
    named = Branch._base_manager.using(branch._state.db).filter(
        session_id=branch.session_id, name=branch.name
    )
    last: int = named.aggregate(last=Max("version"))["last"]
    return last + 1


class Branches:
    """The branches of one session, whose row the caller holds where it writes."""

    def __init__(
        self, directory: Directory, key: SessionKey, current: int | None = None
    ) -> None:
        """Take the session's current branch where its row is held."""
        self.directory = directory
        self.lineages = Lineages(directory.using)
        self.key = key
        self.using = directory.using
        # Only where the key means the session's own branch, which we alone may change.
        self._current = None if key.branch is not None else current

    # -- finding -------------------------------------------------------------------

    def every(self) -> Any:
        session = self.directory.pk_of(self.key)
        return Branch._base_manager.using(self.using).filter(session_id=session)

    def current(self) -> Branch | None:
        """Find the branch that the key means; None where the session has no row."""
        if self._current is not None:
            held: Branch = Branch._base_manager.using(self.using).get(pk=self._current)
            return held
        branch: Branch | None = self.directory.branches(self.key).first()
        if branch is None:
            self.directory.assert_own(self.key)
        return branch

    def named(self, name: str | None) -> Branch | None:
        """Find a branch by name, or the current one.

        None is given for the main branch of a session that has no row yet. Raises
        SessionDoesNotExist for someone else's and BranchDoesNotExist.
        """
        if name is None:
            return self.current()
        check_branch(name)
        branch: Branch | None = (
            self.every().filter(name=name, version=0, archived_at=None).first()
        )
        if branch is None:
            self.directory.assert_own(self.key)
            if name != MAIN_BRANCH:
                raise BranchDoesNotExist(self.key.session_id, name)
        return branch

    def archived(self, label: str) -> Branch:
        """Find a replaced branch. Raises BranchDoesNotExist."""
        check_branch(label)
        found = self._replaced().filter(**Branch.of_label(label))
        branch: Branch | None = found.first()
        if branch is None:
            raise BranchDoesNotExist(self.key.session_id, label)
        return branch

    def replaced_by(self, branch_id: int) -> Branch | None:
        """Find the archived branch in whose place replace() put another."""
        branch: Branch | None = self.every().filter(pk=branch_id).first()
        if branch is None or branch.parent_id is None:
            return None
        older = self._replaced().filter(pk__lt=branch_id, name=branch.name)
        found: Branch | None = older.order_by("-pk").first()
        return found

    def archived_names(self) -> list[str]:
        """Return the labels of replaced branches that still have something to show."""
        return [
            branch.label
            for branch in self._replaced().order_by("pk")
            if self.items(branch).exists()
        ]

    def segments(self, branch: Branch) -> tuple[Segment, ...]:
        if branch.parent_id is None:
            return (Segment(branch.pk, 0),)
        return self.lineages.of(branch.pk)

    def items(self, branch: Branch, **bounds: int) -> Any:
        """Return the items of a branch, within the bounds of visible()."""
        return visible(self.using, self.segments(branch), **bounds)

    def _replaced(self) -> Any:
        return self.every().filter(version__gt=0, is_quarantine=False)

    # -- listing -------------------------------------------------------------------

    def listing(self) -> list[dict[str, Any]]:
        current = self.current()
        return [
            {
                "branch_id": branch.name,
                "message_count": self.items(branch).count(),
                "user_turns": branch.turn,
                "is_current": current is not None and branch.pk == current.pk,
                "created_at": iso(branch.created_at, " "),
            }
            for branch in self.every().filter(archived_at=None).order_by("pk")
        ]

    # -- forking -------------------------------------------------------------------

    def fork_before_turn(self, turn: int, name: str | None) -> str:
        """Make the current branch one that ends before a user's turn."""
        check_turn(turn)
        source = self.current()
        first = None if source is None else self.first_of_turn(source, turn)
        if source is None or first is None:
            where = self.key.branch or (source.name if source else MAIN_BRANCH)
            raise InvalidBranch(
                f"Turn {turn} does not contain a user message in branch {where!r}. "
                "get_conversation_turns() lists those that do."
            )
        if name is None:
            name = self.free_name(f"branch_from_turn_{turn}_{int(time.time())}")
        return self.fork(source, first - 1, turn - 1, name).name

    def first_of_turn(self, source: Branch, turn: int) -> int | None:
        return first_of_turn(self.using, self.segments(source), turn)

    def fork(self, source: Branch, position: int, turn: int, name: str) -> Branch:
        """Make a branch that shows `source` up to a position, and switch to it."""
        self._check_name(source.session_id, name)
        parent = segment_of(self.segments(source), position)
        branch: Branch = Branch._base_manager.using(self.using).create(
            session_id=source.session_id,
            name=name,
            parent_id=parent.branch_id,
            fork_position=position,
            head=position,
            turn=turn,
        )
        self.point_at(branch)
        return branch

    def replace(
        self, source: Branch, position: int, turn: int, *, shown: Branch | None = None
    ) -> Branch:
        """Move a branch's name to its history up to a position; keep the old rows.

        The old branch is archived as a version of the name: lineages never change.
        The history may be that of another branch, which is `shown`.
        """
        rows = Branch._base_manager.using(self.using).filter(pk=source.pk)
        rows.update(version=next_version(source), archived_at=timezone.now())
        shown = source if shown is None else shown
        parent = segment_of(self.segments(shown), position)
        branch: Branch = Branch._base_manager.using(self.using).create(
            session_id=source.session_id,
            name=source.name,
            parent_id=parent.branch_id,
            fork_position=position,
            # Positions of the session are never given twice, whatever the branch.
            head=max(position, source.head, shown.head),
            turn=turn,
        )
        AgentSession.objects.using(self.using).filter(
            pk=source.session_id, branch_id=source.pk
        ).update(branch=branch)
        if self._current == source.pk:
            self._current = branch.pk
        return branch

    def _check_name(self, session: int, name: str) -> None:
        check_branch(name)
        if not name.strip():
            raise InvalidBranch("Branch name cannot be empty.")
        if len(name) > NAME_LENGTH or "\x00" in name or LABEL_MARK in name:
            raise InvalidBranch(
                f"A branch name has up to {NAME_LENGTH} characters, and neither NUL nor "
                f"{LABEL_MARK}."
            )
        named = Branch._base_manager.using(self.using).filter(
            session_id=session, name=name
        )
        if named.exists():
            raise InvalidBranch(
                f"Branch ID {name!r} has already been used. Choose a new branch ID: "
                "names stay reserved, so that no stale session writes into another's."
            )

    def free_name(self, base: str) -> str:
        """Return a name that was never used, as near to `base` as can be."""
        taken = set(self.every().values_list("name", flat=True))
        names = (base if n == 1 else f"{base}_{n}" for n in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)

    # -- switching and deleting ------------------------------------------------------

    def point_at(self, branch: Branch) -> None:
        """Make a branch the session's current one, unless the key names its own."""
        if self.key.branch is None:
            sessions = AgentSession.objects.using(self.using)
            sessions.filter(pk=branch.session_id).update(branch=branch)
            self._current = branch.pk

    def switch(self, name: str) -> None:
        branch = self.named(name)
        if branch is None:
            raise BranchDoesNotExist(self.key.session_id, name)
        self.point_at(branch)

    def delete(self, name: str, *, force: bool) -> None:
        """Delete a branch's own rows, but for those that other branches show.

        Its name stays reserved.
        """
        if name:
            check_branch(name)
        if not name or not name.strip():
            raise InvalidBranch("Branch ID cannot be empty.")
        if name == MAIN_BRANCH:
            raise InvalidBranch("Cannot delete the 'main' branch.")
        branch = self.named(name)
        current = self.current()
        if branch is None:
            raise BranchDoesNotExist(self.key.session_id, name)
        # A key that names a branch leaves the session's own as it is.
        pointed = AgentSession.objects.using(self.using).filter(branch_id=branch.pk)
        if (current is not None and current.pk == branch.pk) or pointed.exists():
            if not force:
                raise InvalidBranch(
                    f"Cannot delete current branch {name!r}. Use force=True or switch "
                    "branches first."
                )
            if (main := self.named(MAIN_BRANCH)) is not None:
                pointed.update(branch=main)
                self.point_at(main)
        branches = Branch._base_manager.using(self.using)
        branches.filter(pk=branch.pk).update(archived_at=timezone.now())
        needed = branches.filter(parent_id=branch.pk).aggregate(
            upto=Max("fork_position")
        )["upto"]
        rows = SessionItem._base_manager.using(self.using).filter(branch_id=branch.pk)
        if needed is not None:
            rows = rows.filter(position__gt=needed)
        count, _ = rows.delete()
        self.directory.rows(self.key).update(item_count=F("item_count") - count)


def undo_turn(branches: Branches) -> int | None:
    """End the current branch before its last turn. Return that turn's number.

    A turn goes from a user's message to before the next one, so calls and their
    outputs stay together. The rows are kept, on an archived branch. Where the turn
    holds what a compaction put in the place of others, it is taken back in the history
    as it was before: the summary tells of all turns, not of the last one.
    """
    branch = branches.current()
    histories = [] if branch is None else [branch]
    while histories and (before := _before_compaction(branches, histories[-1])):
        histories.append(before)
    for shown in reversed(histories):
        turn: int = shown.turn
        first = branches.first_of_turn(shown, turn) if turn else None
        if first is not None:
            branches.replace(histories[0], first - 1, turn - 1, shown=shown)
            return turn
    return None


def fork_at(branches: Branches, turn: int, name: str | None) -> str:
    """Make a branch that ends with a turn, and switch to it; 0 keeps no turn."""
    check_turn(turn)
    branch = branches.current()
    if branch is None:
        raise InvalidBranch("There is nothing to fork: this session has no items yet.")
    if not 0 <= turn <= branch.turn:
        raise InvalidBranch(
            f"There is no turn {turn} to fork at: this branch has turns 0 to "
            f"{branch.turn}."
        )
    position = _end_of_turn(branches, branch, turn)
    chosen = name or branches.free_name(f"fork_at_turn_{turn}")
    return branches.fork(branch, position, turn, chosen).name


def restore(branches: Branches, archived: str) -> str:
    """Make an archived branch current again under a name of its own."""
    found = branches.archived(archived)
    name = branches.free_name(f"{found.name}_restored")
    return branches.fork(found, found.head, found.turn, name).name


def _before_compaction(branches: Branches, branch: Branch) -> Branch | None:
    """Find the history that a compaction in a branch's last turn has replaced."""
    rows = branches.items(branch)
    summary = (
        rows.filter(turn=branch.turn, type="compaction").order_by("-position").first()
    )
    if summary is None:
        return None
    own = rows.filter(branch_id=summary.branch_id).order_by("position")
    # A model's own compaction stands in a response, not where the branch begins.
    if own.values_list("created_at", flat=True).first() != summary.created_at:
        return None
    return branches.replaced_by(summary.branch_id)


def _end_of_turn(branches: Branches, branch: Branch, turn: int) -> int:
    if turn == branch.turn:
        return branch.head
    first = branches.first_of_turn(branch, turn + 1)
    if first is None:
        raise InvalidBranch(
            f"Turn {turn + 1} has lost its user message, so its beginning can't be "
            "found. Fork at another turn."
        )
    return first - 1
