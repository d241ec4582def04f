"""Erase what a person has said, in every store, with a receipt.

Beside their rows, the admin's log and lone keys name a person's sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from django.apps import apps
from django.contrib.auth.base_user import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.db import router
from django.db.models import Exists, Model, OuterRef
from django.utils import timezone

from agent_sessions.backends.remote.erasure import owner_text
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession, PendingClear, SessionSecret
from agent_sessions.owners import owner_key
from agent_sessions.retention.pending import retry_pending
from agent_sessions.retention.removal import (
    Removal,
    Spared,
    finish_removals,
    remove_all,
    unfinished_items,
)
from agent_sessions.retention.selection import Selection, databases, in_chunks
from agent_sessions.times import iso

FORMAT = "agent-sessions/erasure-1"
# What stands in the log for an erased session.
ERASED = "erased"
_MAX_KEY = 2**63 - 1


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
        return cls(user.get_username(), str(user.pk), iso(timezone.now()))

    def leave(self, row: AgentSession | PendingClear, code: str, reason: str) -> None:
        """Write down that a session is left, and why."""
        self.left.append(Left(row.backend, row.session_id, code, reason))

    @property
    def is_complete(self) -> bool:
        return bool(self.finished_at) and not self.left

    def as_json(self) -> dict[str, Any]:
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
    using, began, gone = databases(), timezone.now(), set[int]()
    # First: whose an entry is can't be told once the rows are gone.
    receipt.log_entries += _blank_log_of(user.pk, using)
    for row, items in remove_all(Selection(user=user).rows(), how):
        if isinstance(items, Spared):
            receipt.leave(row, "run_active", f"Left, because {items}.")
        elif isinstance(items, AgentSessionError):
            receipt.leave(row, "store_failed", str(items))
        else:
            gone.add(row.pk)
            if items is not None:
                receipt.erased.append(Erased(row.backend, row.session_id, items))
    finish_removals(batch_size=batch_size)
    if unfinished := unfinished_items():
        reason = f"Another process is deleting {unfinished} items; some may be theirs."
        receipt.left.append(Left("", "", "removing", reason))
    _finish_deleted(receipt, user, using)
    receipt.keys += _delete_lone_keys(user.pk, using, began)
    # What was logged meanwhile.
    receipt.log_entries += _blank_log(
        lambda model, keys: keys & gone if issubclass(model, AgentSession) else set()
    )
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


# -- traces ----------------------------------------------------------------------------


def owner_filter(model: type[Model], user_id: Any) -> dict[str, Any] | None:
    """Return which rows of a model are a person's; None where it has no owner."""
    if issubclass(model, AgentSession):
        return {"user_id": user_id}
    if path := getattr(model, "owner_path", ""):
        return {f"{path}__user_id": user_id}
    if any(field.name == "owner" for field in model._meta.fields):
        return {"owner": owner_text(user_id)}
    return None


def _delete_lone_keys(user_id: Any, using: list[str], before: datetime) -> int:
    """Delete a person's session keys that no session has; tell how many.

    A session that is just being made has its key before its row: what is younger than
    `before` stays.
    """
    count = 0
    for name in using:
        rows = AgentSession.objects.using(name).filter(
            user_id=user_id,
            backend=OuterRef("backend"),
            session_id=OuterRef("session_id"),
        )
        keys = SessionSecret.objects.using(name).filter(
            ~Exists(rows), owner=owner_text(user_id), created_at__lt=before
        )
        count += keys.delete()[0]
    return count


def _blank_log_of(user_id: Any, using: list[str]) -> int:
    """Remove the names of a person's rows from the admin's log; return how many.

    Who did what kind of thing, and when, stays. It is asked while the rows are still
    there: nothing else says whose an entry is.
    """

    def find(model: type[Model], keys: set[int]) -> set[int]:
        owned = owner_filter(model, user_id)
        if owned is None:
            return set()
        queries = (
            model._base_manager.using(name).filter(**owned, pk__in=keys)
            for name in using
        )
        return {pk for rows in queries for pk in rows.values_list("pk", flat=True)}

    return _blank_log(find)


def _blank_log(find: Callable[[type[Model], set[int]], set[int]]) -> int:
    """Blank the log's entries about those rows of a model that `find` returns."""
    if not apps.is_installed("django.contrib.admin"):
        return 0
    from django.contrib.admin.models import LogEntry
    from django.contrib.contenttypes.models import ContentType

    # From where they are written: a replica may lag behind.
    using = router.db_for_write(LogEntry)
    kinds = ContentType.objects.db_manager(using)
    own = tuple(apps.get_app_config("agent_sessions").get_models())
    count = 0
    # A project's proxies of our models too.
    for model in (each for each in apps.get_models() if issubclass(each, own)):
        kind = kinds.get_for_model(model, for_concrete_model=False)
        entries = LogEntry.objects.using(using).filter(content_type=kind)
        for chunk in in_chunks(entries.exclude(object_id=None).only("object_id")):
            keys = {entry.pk: _key(entry.object_id) for entry in chunk}
            found = find(model, {key for key in keys.values() if key is not None})
            named = entries.filter(pk__in=[pk for pk in keys if keys[pk] in found])
            count += named.update(object_id=None, object_repr=ERASED, change_message="")
    return count


def _key(object_id: str | None) -> int | None:
    try:
        key = AgentSession._meta.pk.to_python(object_id)
    except (ValidationError, ValueError):
        return None
    return key if isinstance(key, int) and 0 < key <= _MAX_KEY else None
