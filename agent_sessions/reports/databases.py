"""What may be told of a database's errors, which can quote contents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import Error

from agent_sessions.exceptions import StorageError

# Of PostgreSQL: connections, resources, limits, states, operators, disks, itself. Its
# other words may quote values: those of data, and of the project's own triggers.
_TOLD_STATES = ("08", "25", "26", "28", "40", "42", "53", "54", "55", "57", "58", "XX")
# Of MySQL and MariaDB: from here on the client speaks, of the connection.
_CLIENT_ERRORS = range(2000, 3000)


class Told(str):
    """What an error keeps of its text."""

    __slots__ = ()


def told(error: BaseException) -> str:
    """Return what a database error is, without what it says of values.

    "IntegrityError: 23514, constraint item_text_check of table item", for example: as
    much as tells the cause, since the error itself is not chained.
    """
    facts = facts_of(error)
    return f"{type(error).__name__}: {facts}" if facts else type(error).__name__


@contextmanager
def as_storage_error(using: str, what: str) -> Iterator[None]:
    """Raise StorageError where a database fails; `what` is what it was asked to do."""
    try:
        yield
    except Error as exc:
        raise StorageError(
            f"The database {using!r} refused to {what} ({told(exc)}). See that it is "
            "up, migrated and reachable, then try again."
        ) from None


def facts_of(error: BaseException) -> str:
    """Return what may be told of a database error beside its class; "" for nothing."""
    if error.args and isinstance(error.args[0], Told):
        return error.args[0]
    cause: Any = error.__cause__ or error
    return _postgresql(cause) or _sqlite(cause) or _mysql(cause)


def _postgresql(cause: Any) -> str:
    diag = getattr(cause, "diag", None)
    if diag is None:
        return ""
    # psycopg2 has another name for it.
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if state is None:
        # The connection failed: its words name the host and the reason.
        is_connection = type(cause).__name__ == "OperationalError"
        return _line(str(cause)) if is_connection else ""
    facts = [str(state)]
    if diag.constraint_name:
        facts.append(f"constraint {diag.constraint_name} of table {diag.table_name}")
    # Where there is a context, a function has chosen the words.
    elif state.startswith(_TOLD_STATES) and diag.message_primary and not diag.context:
        facts.append(_line(diag.message_primary))
    return ", ".join(facts)


def _sqlite(cause: Any) -> str:
    name = getattr(cause, "sqlite_errorname", None)
    if name is None:
        return ""
    # A trigger chooses its own words.
    words = "" if name == "SQLITE_CONSTRAINT_TRIGGER" else f", {_line(str(cause))}"
    return f"{name}{words}"


def _mysql(cause: Any) -> str:
    match cause.args:
        case (int(number), str(words)) if number in _CLIENT_ERRORS:
            return f"{number}, {_line(words)}"
        case (int(number), *_):
            return str(number)
    return ""


def _line(words: str) -> str:
    """Return the first line; others hold details."""
    return words.strip().partition("\n")[0].rstrip(".")
