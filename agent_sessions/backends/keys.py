"""Which session is meant, what is read of it, and how a write of it is awaited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from django.contrib.auth import get_user_model
from django.db.models import Model

from agent_sessions.backends.arguments import check_branch, check_session_id
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item, StoredItem
from agent_sessions.owners import owner_key

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

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

    def assert_open(self) -> None:
        """Pass where no item is still in its envelope, as an unknown key leaves it.

        Raises EncryptionError, also where none opens: that must not look like an empty
        history.
        """
        for stored in self.items:
            if stored.is_closed and stored.item is not None:
                raise EncryptionError(
                    "The history has items under the encryption key "
                    f"{stored.missing_key!r}, which do not open here. Add that key "
                    "behind the others, or set accept_sdk_envelopes=True if the SDK's "
                    "EncryptedSession wrote them; nothing was changed."
                )
        if self.items and all(stored.is_closed for stored in self.items):
            raise EncryptionError(
                f"None of {len(self.items)} items of the history opens: they were not "
                "encrypted, were changed, or were copied or moved here. Nothing was "
                "changed."
            )


class PopsIf(Protocol):
    """What a backend has that looks at an item and takes it in one step."""

    def pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        """Remove and return the newest item that is accepted; others stay.

        `asking` returns what is asked of each item, from the newest back: it is called
        again where the store begins anew. Where that raises, nothing happens.
        """

    async def apop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        """See pop_if()."""


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
