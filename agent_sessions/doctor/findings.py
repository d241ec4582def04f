"""What the doctor can find, in words that quote nothing of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Code(NamedTuple):
    """One kind of finding; `repair` is empty where nothing has to be done."""

    message: str
    repair: str


_MOVE = "move the row into the quarantine"

CODES = {
    "orphan_output": Code(
        "The output of a tool has no call before it: models refuse this history.", _MOVE
    ),
    "dangling_call": Code(
        "The call of a tool has no output; the SDK leaves it out of what it sends.", ""
    ),
    "duplicate_turn": Code(
        "The user's message is stored again right after itself, without an answer.",
        _MOVE,
    ),
    "unreadable_row": Code("The row is not JSON, so reading passes over it.", _MOVE),
    "scalar_row": Code(
        "The row is JSON, but no object; reading passes over it.", _MOVE
    ),
    "wrong_columns": Code(
        "The row's columns disagree with its data.", "draw the columns from the data"
    ),
    "wrong_turn": Code(
        "From this row on, {count} rows have another turn than user messages give.",
        "number the turns anew",
    ),
    "wrong_branch_turn": Code(
        "The branch counts {found} turns and shows {expected}.", "count anew"
    ),
    "wrong_head": Code(
        "The branch ends at {found}, but position {expected} is taken: what is written "
        "there fails or is not shown.",
        "let the branch end there",
    ),
    "hidden_rows": Code(
        "{count} rows from here on have positions that the branch has from its parent.",
        "",
    ),
    "wrong_item_count": Code(
        "The session counts {found} items and has {expected}.", "count anew"
    ),
    "missing_title": Code(
        "The session has messages of its user, but no title.",
        "take the title from the first message",
    ),
    "no_branch": Code(
        "The session's current branch is none that it can show.",
        "make the main branch current",
    ),
    "stale_lease": Code(
        "A run holds the session, but its process is gone.",
        "give the session back and mark the run as interrupted",
    ),
    "unfinished_run": Code(
        "A run counts as running, but does not hold the session and began long ago.",
        "mark the run as interrupted",
    ),
    "expired_approval": Code(
        "A run waits for an approval whose time is over.", "cancel the run"
    ),
    "lost_state": Code(
        "A run waits for an approval, but its state is gone.", "cancel the run"
    ),
    "wrong_state": Code(
        "The session says that it is {found}, and is {expected}.", "correct the state"
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where it is, and what a repair does about it."""

    code: str
    session: Any
    session_id: str
    branch: str | None
    position: int | None
    message: str
    repair: str
    repaired: bool = False

    @property
    def is_left(self) -> bool:
        """Whether there is still something to mend."""
        return bool(self.repair) and not self.repaired


@dataclass(frozen=True, slots=True)
class Skipped:
    """A session that was not examined; `failed` where it could not be."""

    session: Any
    session_id: str
    reason: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row in the quarantine, by the branch and position that it had."""

    session: Any
    session_id: str
    branch: str
    position: int


@dataclass(slots=True)
class Report:
    """What an examination found."""

    sessions: int = 0
    items: int = 0
    findings: list[Finding] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def left(self) -> list[Finding]:
        """What is still to be mended."""
        return [finding for finding in self.findings if finding.is_left]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is to be mended, and nothing could not be looked at."""
        return not self.left and not any(skip.failed for skip in self.skipped)
