"""Which session is meant, what is read of it, and how a write of it is awaited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from django.contrib.auth import get_user_model
from django.db.models import Model

from agent_sessions.backends.arguments import check_branch, check_session_id
from agent_sessions.items import StoredItem
from agent_sessions.owners import owner_key

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

T = TypeVar("T")

# Makes what a pop asks of items, from the newest back: a store that begins anew, since
# somebody else was faster, asks anew too.
Asking = Callable[[], Callable[[Any], bool]]


def anything() -> Callable[[Any], bool]:
    """Accept every item."""
    return lambda item: True


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Which session is meant, and who asks.

    `branch` None means the session's current branch. `fence` is the number of the
    lease under which a run writes; None outside a run.
    """

    session_id: str
    user_id: Any = None
    branch: str | None = None
    fence: int | None = None

    def fenced(self, fence: int | None) -> SessionKey:
        """Return the same key as used under a lease."""
        return replace(self, fence=fence)


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a history, oldest first, with unreadable rows in their places."""

    items: list[StoredItem]
    has_earlier: bool
    has_later: bool = False


def make_key(
    session_id: str,
    user: AbstractBaseUser | AnonymousUser | None,
    *,
    branch: str | None = None,
) -> SessionKey:
    """Check an id, its owner and a branch.

    Raises InvalidSessionId, InvalidOwner and InvalidBranch.
    """
    check_session_id(session_id)
    if branch is not None:
        check_branch(branch)
    return SessionKey(session_id, None if user is None else owner_key(user), branch)


def names_user(user: Any) -> bool:
    """Return whether the key of what stands for a user is a user's.

    That of another model's row may be anybody's; what is no row vouches for its own.
    """
    return not isinstance(user, Model) or isinstance(user, get_user_model())
