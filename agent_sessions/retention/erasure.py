"""Erase what a person has said, in every store, with a receipt."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from django.contrib.auth.base_user import AbstractBaseUser
from django.utils import timezone

from agent_sessions.backends.remote.erasure import owner_text
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession, PendingClear
from agent_sessions.owners import owner_key
from agent_sessions.retention.pending import retry_pending
from agent_sessions.retention.removal import (
    Removal,
    Spared,
    finish_removals,
    remove_all,
    unfinished_items,
)
from agent_sessions.retention.selection import Selection, databases
from agent_sessions.retention.traces import (
    blank_log_about,
    blank_log_of,
    delete_lone_keys,
)
from agent_sessions.times import iso

FORMAT = "agent-sessions/erasure-1"


@dataclass(frozen=True, slots=True)
class Erased:
    """A session that is gone, with the number of its items."""

    backend: str
    session_id: str
    items: int


@dataclass(frozen=True, slots=True)
class Left:
    """A session that is still there, and why: a code for programs, words for people.

    The codes are `run_active`, `store_failed`, `pending` for what a session that was
    deleted earlier has left in its store, and `removing` for items of sessions without
    a name, which another process is deleting.
    """

    backend: str
    session_id: str
    code: str
    reason: str


@dataclass(slots=True)
class Receipt:
    """What became of a person's sessions."""

    user: str
    user_pk: str
    started_at: str
    finished_at: str = ""
    # Entries of the admin's log that named them, and keys of sessions that were gone.
    log_entries: int = 0
    keys: int = 0
    erased: list[Erased] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @classmethod
    def of(cls, user: AbstractBaseUser) -> Receipt:
        """Begin the receipt of a user."""
        return cls(user.get_username(), str(user.pk), iso(timezone.now()))

    def leave(self, row: AgentSession | PendingClear, code: str, reason: str) -> None:
        """Write down that a session is left, and why."""
        self.left.append(Left(row.backend, row.session_id, code, reason))

    @property
    def is_complete(self) -> bool:
        """Return whether it came to its end and nothing is left."""
        return bool(self.finished_at) and not self.left

    def as_json(self) -> dict[str, Any]:
        """Return the receipt as plain values."""
        return {
            "format": FORMAT,
            **asdict(self),
            "complete": self.is_complete,
            "sessions": len(self.erased),
            "items": sum(each.items for each in self.erased),
        }


def erase_user(user: AbstractBaseUser, receipt: Receipt, *, batch_size: int) -> None:
    """Erase all sessions of a user with their items, runs, approvals and keys.

    What the admin's log calls them goes too; who did something, and when, stays there.
    The user stays. A session with an active run and one whose store can't be reached
    are left and told; a later call goes on with them. Raises InvalidBackend and
    InvalidOwner.
    """
    owner_key(user)
    how = Removal(delete=True, waiting=True, batch_size=batch_size)
    using, began, gone = databases(), timezone.now(), list[Any]()
    # First: whose an entry is can't be told once the rows are gone.
    receipt.log_entries += blank_log_of(user.pk, using)
    for row, items in remove_all(Selection(user=user).rows(), how):
        if isinstance(items, Spared):
            receipt.leave(row, "run_active", f"Left, because {items}.")
        elif isinstance(items, AgentSessionError):
            receipt.leave(row, "store_failed", str(items))
        else:
            gone.append(row.pk)
            if items is not None:
                receipt.erased.append(Erased(row.backend, row.session_id, items))
    finish_removals(batch_size=batch_size)
    if unfinished := unfinished_items():
        reason = f"Another process is deleting {unfinished} items; some may be theirs."
        receipt.left.append(Left("", "", "removing", reason))
    _finish_deleted(receipt, user, using)
    receipt.keys += delete_lone_keys(user.pk, using, began)
    # What was logged meanwhile.
    receipt.log_entries += blank_log_about(gone)
    receipt.finished_at = iso(timezone.now())


def _finish_deleted(receipt: Receipt, user: AbstractBaseUser, using: list[str]) -> None:
    """Ask stores again for what sessions that were deleted earlier have left there."""
    before = _pending(user, using)
    for alias in sorted({row.backend for row in before}):
        retry_pending(alias)
    after = {(row._state.db, row.pk): row for row in _pending(user, using)}
    for row in before:
        still = after.get((row._state.db, row.pk))
        if still is None:
            receipt.erased.append(Erased(row.backend, row.session_id, 0))
            continue
        why = f" ({still.error_code})" if still.error_code else ""
        receipt.leave(
            row,
            "pending",
            f"The session was deleted earlier, and its store couldn't be reached{why}.",
        )


def _pending(user: AbstractBaseUser, using: list[str]) -> list[PendingClear]:
    return [
        row
        for name in using
        for row in PendingClear.objects.using(name).filter(owner=owner_text(user.pk))
    ]
