"""Which session is meant, what is read of it, and how a write of it is awaited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from django.contrib.auth import get_user_model
from django.db.models import Model

from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBranch,
    InvalidLimit,
    InvalidSessionId,
)
from agent_sessions.items import Item, StoredItem
from agent_sessions.owners import owner_key

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

SESSION_ID_LENGTH = 255
# More items than any history has; stores count with whole numbers of 64 bits at most.
MOST_ITEMS = 2**31 - 1
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
    """A stretch of a history, oldest first, with unreadable rows in their places.

    `total` is how many items the whole history has, where the store tells it.
    """

    items: list[StoredItem]
    has_earlier: bool
    has_later: bool = False
    total: int | None = None
    # The branch it was read of, and the place of what comes after it among others.
    branch: str = ""
    siblings: dict[str, Any] | None = None

    def assert_open(self) -> None:
        """Raise EncryptionError if an item is still in its envelope.

        An unknown key leaves it there. Raise it also if none opens: that must not look like an empty
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


# -- what callers give to every backend alike -----------------------------------------


def check_session_id(session_id: Any) -> str:
    """Return an id that every store takes. Raises InvalidSessionId."""
    if not isinstance(session_id, str):
        raise InvalidSessionId(
            f"A session id is a str, not a {type(session_id).__name__}."
        )
    if not 1 <= len(session_id) <= SESSION_ID_LENGTH:
        raise InvalidSessionId(
            f"A session id has 1 to {SESSION_ID_LENGTH} characters; this one has "
            f"{len(session_id)}. Hash a longer key, or use AgentSession.new_id()."
        )
    if not is_text(session_id):
        raise InvalidSessionId(
            "A session id can't hold NUL characters or lone surrogates, which "
            "databases refuse. Remove them."
        )
    return session_id


def check_branch(name: Any) -> None:
    """Refuse what can't be the name of a branch. Raises InvalidBranch."""
    if not isinstance(name, str):
        raise InvalidBranch(f"A branch name is a str, not a {type(name).__name__}.")
    if not is_text(name):
        raise InvalidBranch(
            "A branch name can't hold NUL characters or lone surrogates, which "
            "databases refuse."
        )


def is_text(value: str) -> bool:
    """Return whether every database takes a text: no NUL, and no lone surrogate."""
    return "\x00" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def check_limit(limit: Any) -> int | None:
    """Return a limit as stores take it.

    Raises InvalidLimit where it is neither None nor a whole number of 0 or more.
    """
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, int) or limit < 0
    ):
        raise InvalidLimit(limit)
    return None if limit is None else min(limit, MOST_ITEMS)
