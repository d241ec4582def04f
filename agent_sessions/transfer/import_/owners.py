"""Whose an imported session is: by one name, by its id, or by its source."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError

from agent_sessions.backends.keys import is_text
from agent_sessions.owners import owners
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    SourceSession,
    UnreadableSource,
)

# How many owners are remembered, so that memory stays bounded.
_KNOWN = 10_000


class Owners:
    """Return whose a session is: one user's, or as its id or its source says.

    `rule` finds a name in the id, such as `user:{username}:*`: `{username}`, `{email}`
    or `{pk}` stands for the user and `*` for anything. A rule without any is what
    comes before the user's name, which ends at `:`, `/` or the end.
    """

    def __init__(self, user: str | None = None, rule: str | None = None) -> None:
        # Several sessions have the same owner.
        self._find = lru_cache(maxsize=_KNOWN)(_find)
        self._user = user
        self._rule = rule
        if rule is not None:
            self._field, self._pattern = _read_rule(rule)
        if user is not None:
            try:
                self._find("username", user)
            except ImportProblem as exc:
                raise UnreadableSource(f"--user: {exc}") from exc

    def of(self, session: SourceSession) -> Any:
        """Return the owner's primary key; None without an owner. Raise ImportProblem."""
        field, name = "username", session.owner
        if self._user is not None:
            name = self._user
        elif self._rule is not None:
            match = self._pattern.fullmatch(session.session_id)
            if match is None:
                raise ImportProblem(
                    f"its id doesn't fit --user-from {self._rule!r}, so nobody owns "
                    "it. Import it apart, with --session-id and --user."
                )
            field, name = self._field, match["user"]
        return None if name is None else self._find(field, name)


def _read_rule(rule: str) -> tuple[str, re.Pattern[str]]:
    """Return the field that a rule finds, and its pattern. Raises UnreadableSource."""
    fields = re.findall(r"\{(username|email|pk)\}", rule)
    if not rule or len(fields) > 1:
        raise UnreadableSource(
            "--user-from takes one of {username}, {email} and {pk}, as in "
            "'user:{username}:*', or a prefix, as in 'user:'."
        )
    pattern = re.escape(rule)
    if not fields:
        pattern += "(?P<user>[^:/]+)(?:[:/].*)?"
        return "username", re.compile(pattern, re.DOTALL)
    pattern = pattern.replace(r"\*", ".*")
    pattern = pattern.replace(re.escape(f"{{{fields[0]}}}"), "(?P<user>[^:/]+)")
    return fields[0], re.compile(pattern, re.DOTALL)


def _find(field: str, value: str) -> Any:
    model: Any = get_user_model()
    names = {"username": model.USERNAME_FIELD, "email": model.get_email_field_name()}
    try:
        if not is_text(value):
            raise ValueError
        return owners().get(**{names.get(field, "pk"): value}).pk
    except (model.DoesNotExist, ValueError, ValidationError):
        raise ImportProblem(f"there is no user whose {field} is {value!r}.") from None
    except model.MultipleObjectsReturned:
        raise ImportProblem(f"several users have the {field} {value!r}.") from None
