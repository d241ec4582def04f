"""What callers give to every backend alike."""

from __future__ import annotations

from typing import Any

from agent_sessions.exceptions import (
    InvalidBackend,
    InvalidBranch,
    InvalidLimit,
    InvalidSessionId,
)

SESSION_ID_LENGTH = 255
# More items than any history has; stores count with whole numbers of 64 bits at most.
MOST_ITEMS = 2**31 - 1


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


def check_run_session(alias: str, wrap: Any) -> None:
    """Refuse an option run_session that is no function and no dotted path."""
    if not (wrap is None or callable(wrap) or (isinstance(wrap, str) and "." in wrap)):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: run_session is {wrap!r}.",
            hint="Give the dotted path of a function that gets a session and returns "
            "the one that the Runner uses.",
            id="agent_sessions.E008",
        )
