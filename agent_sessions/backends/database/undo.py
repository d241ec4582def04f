"""Take back turns and fork anywhere, without cutting a call from its output."""

from __future__ import annotations

from agent_sessions.backends.database.branches import (
    Branches,
    check_turn,
)
from agent_sessions.exceptions import InvalidBranch
from agent_sessions.models import Branch


def undo_turn(branches: Branches) -> int | None:
    """Let the current branch end before its last turn; tell which turn that was.

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
