"""Take back turns and fork anywhere, without cutting a call from its output."""

from __future__ import annotations

from agent_sessions.backends.database.branches import Branches
from agent_sessions.exceptions import InvalidBranch
from agent_sessions.models import MAIN_BRANCH, Branch


def undo_turn(branches: Branches) -> int | None:
    """Let the current branch end before its last turn; tell which turn that was.

    A turn goes from a user's message to before the next one, so calls and their
    outputs stay together. The rows are kept, on an archived branch.
    """
    branch = branches.current()
    if branch is None or branch.turn == 0:
        return None
    turn: int = branch.turn
    first = branches.first_of_turn(branch, turn)
    if first is None:
        return None
    branches.replace(branch, first - 1, turn - 1)
    return turn


def fork_at(branches: Branches, turn: int, name: str | None) -> str:
    """Make a branch that ends with a turn, and switch to it; 0 keeps no turn."""
    branch = branches.current()
    if branch is None or not 0 <= turn <= branch.turn:
        last = 0 if branch is None else branch.turn
        raise InvalidBranch(
            f"There is no turn {turn} to fork at: this branch has turns 0 to {last}."
        )
    position = _end_of_turn(branches, branch, turn)
    chosen = name or branches.free_name(f"fork_at_turn_{turn}")
    return branches.fork(branch, position, turn, chosen).name


def restore(branches: Branches, archived: str) -> str:
    """Make an archived branch current again under a name of its own."""
    found = branches.archived(archived)
    name = branches.free_name(f"{archived.partition('~')[0] or MAIN_BRANCH}_restored")
    return branches.fork(found, found.head, found.turn, name).name


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
