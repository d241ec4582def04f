"""What every source of an import gives, and what may be wrong with it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import MAIN_BRANCH


class ImportProblem(AgentSessionError):
    """One session can't be imported; it is as it was, and others go on."""


class UnreadableSource(AgentSessionError):
    """A whole source can't be read, or its options don't fit it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a branch has been imported: how many items, and the last one's id.

    `digest` is a hash over all of them, which tells them from any others.
    """

    count: int = 0
    last: int | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One item as its source has it; `position` None means the next one."""

    id: int
    data: str
    created_at: datetime | None = None
    position: int | None = None
    turn: int | None = None


@dataclass(frozen=True, slots=True)
class SourceRun:
    """What one run has used, with the columns of its row.

    Which turn it was about is told by that turn's number in the branch, or by branch
    and position of the user message that opens it.
    """

    run_id: str
    branch: str
    columns: dict[str, Any]
    turn: int | None = None
    opening: tuple[str, int] | None = None


@dataclass(slots=True)
class SourceBranch:
    """A line of history; its items begin after the fork."""

    name: str = MAIN_BRANCH
    parent: str | None = None
    fork_position: int | None = None
    created_at: datetime | None = None
    # Not shown, and its name stays taken.
    archived: bool = False
    # The last position that was taken and the last turn; None where items tell.
    head: int | None = None
    turn: int | None = None


@dataclass(slots=True)
class SourceSession:
    """One conversation of a source, with what its row keeps."""

    session_id: Any
    created_at: datetime | None = None
    updated_at: datetime | None = None
    # The owner's name to log in with, where the source knows one.
    owner: str | None = None
    # The alias of the backend it is from, where the source tells.
    backend: str | None = None
    branches: list[SourceBranch] = field(default_factory=lambda: [SourceBranch()])
    current: str = MAIN_BRANCH
    runs: list[SourceRun] = field(default_factory=list)
    # Values of the session's row: title, metadata, agent_name.
    columns: dict[str, Any] = field(default_factory=dict)
    # Whether its items were encrypted where they are from, and are in clear here.
    opened: bool = False
    # What the source itself shows nowhere, and so isn't imported.
    left_out: int = 0
    # Why the source can't give it whole; it is then refused by name.
    problem: str = ""
    # The source's own key for the session.
    key: Any = None

    @property
    def shown(self) -> str:
        """Name the branch to go on with: the current one, else the main one."""
        shown = {branch.name for branch in self.branches if not branch.archived}
        return self.current if self.current in shown else MAIN_BRANCH


class Source(Protocol):
    """Where sessions come from."""

    # Names the place, so that a second import knows what the first one made.
    name: str

    def total(self) -> int | None:
        """Count the items, for the progress bar; None where that isn't known."""

    def sessions(self) -> Iterator[SourceSession]:
        """Return the sessions one after the other."""

    def grown(self, session: SourceSession, marks: Mapping[str, Mark]) -> set[str]:
        """Name the branches that have items after their marks.

        Raises ImportProblem where the source no longer has what a mark says was
        imported.
        """

    def items(
        self, session: SourceSession, branch: SourceBranch, mark: Mark
    ) -> Iterator[list[SourceItem]]:
        """Return pages of the items that a branch has of its own after the mark.

        Raises ImportProblem before the first page where the source no longer has
        what the mark says was imported.
        """

    def close(self) -> None:
        """Let go of files and connections."""


def extend(digest: str, items: Iterable[SourceItem]) -> str:
    """Go on with the hash of what was taken. Each item is a step: pages may differ."""
    for item in items:
        step = hashlib.sha256(f"{digest}\n{item.id}\n".encode())
        step.update(item.data.encode("utf-8", "surrogatepass"))
        digest = step.hexdigest()
    return digest


def changed(what: str) -> ImportProblem:
    """Make the error for a source that has something else than was imported."""
    return ImportProblem(
        f"the items of {what} that were imported before are others in the source now: "
        "they were changed, or it is another conversation of this id. Delete the "
        "imported session and import again, or import into another --backend."
    )


def after_mark(ids: array[int], mark: Mark, what: str) -> array[int]:
    """Return the ids after a mark. Raises ImportProblem where they have changed."""
    if mark.count and (len(ids) < mark.count or ids[mark.count - 1] != mark.last):
        raise ImportProblem(
            f"the source has removed items of {what} that were imported before, so "
            "what is new can't be told. Delete the imported session and import again."
        )
    return ids[mark.count :]
