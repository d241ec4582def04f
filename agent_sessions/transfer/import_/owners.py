"""Whose an imported session is: by one name, by its id, or by a list."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError

from agent_sessions.backends.arguments import is_text
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
    """Return whose a session is, as its source says; nobody's where it doesn't."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    def of(self, session: SourceSession) -> Any:
        """Return the primary key of the owner. Raises ImportProblem."""
        if session.owner is None:
            return None
        return self.find("username", session.owner)

    def find(self, field: str, value: str) -> Any:
        """Find one user's primary key. Raises ImportProblem."""
        if (field, value) not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[field, value] = _find(field, value)
        return self._known[field, value]


class OneOwner(Owners):
    """One user owns them all."""

    def __init__(self, username: str) -> None:
        super().__init__()
        try:
            self._owner = self.find("username", username)
        except ImportProblem as exc:
            raise UnreadableSource(f"--user: {exc}") from exc

    def of(self, session: SourceSession) -> Any:
        return self._owner


class OwnersFromIds(Owners):
    """The session's id tells, by a rule such as `user:{username}:*`.

    `{username}`, `{email}` or `{pk}` stands for the user and `*` for anything. A rule
    without any is what comes before the user's name, which ends at `:`, `/` or the
    end.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        fields = [field for field, _ in _FIELD.findall(rule) if field]
        if not rule or len(fields) > 1:
            raise UnreadableSource(
                "--user-from takes one of {username}, {email} and {pk}, as in "
                "'user:{username}:*', or a prefix, as in 'user:'."
            )
        if fields:
            self._field = fields[0]
            pattern = "".join(
                _pattern(part) for part in re.split(r"(\{\w+\}|\*)", rule)
            )
        else:
            self._field = "username"
            pattern = re.escape(rule) + "(?P<user>[^:/]+)(?:[:/].*)?"
        self._rule = rule
        self._pattern = re.compile(pattern, re.DOTALL)

    def of(self, session: SourceSession) -> Any:
        match = self._pattern.fullmatch(session.session_id)
        if match is None:
            raise ImportProblem(
                f"its id doesn't fit --user-from {self._rule!r}, so nobody owns it. "
                "Import it apart, with --session-id and --user."
            )
        return self.find(self._field, match["user"])


class OwnersFromFile(Owners):
    """A file tells: lines of a session's id and a user's name."""

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            if text_file(path).stat().st_size > _MOST_BYTES:
                raise UnreadableSource(f"it has more than {_MOST_BYTES:,} bytes.")
            with Path(path).open(encoding="utf-8-sig", newline="") as file:
                rows = [row for row in csv.reader(file) if row]
        except (UnreadableSource, OSError, ValueError, csv.Error) as exc:
            raise UnreadableSource(f"--owners-csv: can't read {path}: {exc}") from exc
        if wrong := [n for n, row in enumerate(rows, 1) if len(row) != 2]:
            raise UnreadableSource(
                f"--owners-csv: row {wrong[0]} has not two columns, a session's id and "
                "a user's name."
            )
        self._names: dict[str, str] = {}
        first: dict[str, int] = {}
        for number, (session_id, name) in enumerate(rows, 1):
            if first.setdefault(session_id, number) != number:
                raise UnreadableSource(
                    f"--owners-csv: rows {first[session_id]} and {number} are of the "
                    f"same session, {session_id[:255]!r}. Keep the one that is right."
                )
            self._names[session_id] = name

    def of(self, session: SourceSession) -> Any:
        try:
            name = self._names[session.session_id]
        except (KeyError, TypeError):
            raise ImportProblem(
                "--owners-csv has no line for it. Add one; a line without a name "
                "means that nobody owns it."
            ) from None
        return self.find("username", name) if name else None


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


def _pattern(part: str) -> str:
    if part == "*":
        return ".*"
    if _FIELD.fullmatch(part):
        return "(?P<user>[^:/]+)"
    return re.escape(part)
