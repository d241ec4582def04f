"""Whose an imported session is: by one name, by its id, or by a list."""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError

from agent_sessions.backends.keys import is_text
from agent_sessions.owners import owners
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    SourceSession,
    UnreadableSource,
    text_file,
)

# How many owners are remembered, so that memory stays bounded.
_KNOWN = 10_000
# Bytes of a list of owners.
_MOST_BYTES = 64 * 1024 * 1024
_FIELD = re.compile(r"\{(username|email|pk)\}|(\*)")


class Owners:
    """Return whose a session is: one user's, or as its id, a list or its source says.

    `rule` finds a name in the id, such as `user:{username}:*`: `{username}`, `{email}`
    or `{pk}` stands for the user and `*` for anything. A rule without any is what
    comes before the user's name, which ends at `:`, `/` or the end. `path` is a file
    of lines of a session's id and a user's name.
    """

    def __init__(
        self, user: str | None = None, rule: str | None = None, path: str | None = None
    ) -> None:
        # Several sessions have the same owner.
        self._find = lru_cache(maxsize=_KNOWN)(_find)
        self._user = user
        self._rule = rule
        self._names = None if path is None else _read_names(path)
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
        elif self._names is not None:
            if session.session_id not in self._names:
                raise ImportProblem(
                    "--owners-csv has no line for it. Add one; a line without a name "
                    "means that nobody owns it."
                )
            name = self._names[session.session_id] or None
        return None if name is None else self._find(field, name)


def _read_rule(rule: str) -> tuple[str, re.Pattern[str]]:
    """Return the field that a rule finds, and its pattern. Raises UnreadableSource."""
    fields = [field for field, _ in _FIELD.findall(rule) if field]
    if not rule or len(fields) > 1:
        raise UnreadableSource(
            "--user-from takes one of {username}, {email} and {pk}, as in "
            "'user:{username}:*', or a prefix, as in 'user:'."
        )
    if fields:
        pattern = "".join(map(_pattern, re.split(r"(\{\w+\}|\*)", rule)))
    else:
        pattern = re.escape(rule) + "(?P<user>[^:/]+)(?:[:/].*)?"
    return fields[0] if fields else "username", re.compile(pattern, re.DOTALL)


def _read_names(path: str) -> dict[str, str]:
    """Read a list of owners. Raises UnreadableSource."""
    try:
        if text_file(path).stat().st_size > _MOST_BYTES:
            raise UnreadableSource(f"it has more than {_MOST_BYTES:,} bytes.")
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnreadableSource, OSError, ValueError, csv.Error) as exc:
        raise UnreadableSource(f"--owners-csv: can't read {path}: {exc}") from exc
    names: dict[str, str] = {}
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UnreadableSource(
                f"--owners-csv: row {number} has not two columns, a session's id and "
                "a user's name."
            )
        if first.setdefault(row[0], number) != number:
            raise UnreadableSource(
                f"--owners-csv: rows {first[row[0]]} and {number} are of the "
                f"same session, {row[0][:255]!r}. Keep the one that is right."
            )
        names[row[0]] = row[1]
    return names


def _find(field: str, value: str) -> Any:
    """Find one user's primary key. Raises ImportProblem."""
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


def _pattern(part: str) -> str:
    if part == "*":
        return ".*"
    if _FIELD.fullmatch(part):
        return "(?P<user>[^:/]+)"
    return re.escape(part)
