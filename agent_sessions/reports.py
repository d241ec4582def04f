"""Keep contents and keys out of error reports: Django's, Sentry's, a debugger's.

A report shows the local variables of each frame that an error came through, and the
text of each error in its chain. So an error that leaves one of our doors leaves the
variables behind, and an error of a driver or a store, whose text may quote what it was
given, is replaced by one of ours instead of being chained.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any, TypeVar, cast

from django.db import Error, InterfaceError, OperationalError

from agent_sessions.exceptions import StorageError, StoreUnavailable

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

# Of PostgreSQL: connections, resources, limits, states, operators, disks, itself. Its
# other words may quote values: those of data, and of the project's own triggers.
_TOLD_STATES = ("08", "25", "26", "28", "40", "42", "53", "54", "55", "57", "58", "XX")
# Of MySQL and MariaDB: from here on the client speaks, of the connection.
_CLIENT_ERRORS = range(2000, 3000)


# -- functions -------------------------------------------------------------------------


def guarded(function: F) -> F:
    """Decorate a function so that its errors carry no variables of any frame.

    That includes the frames of libraries. Files and lines stay. Unlike Django's
    sensitive_variables(), it works for every report, and with DEBUG on.
    """

    @wraps(function)
    def guard(*args: Any, **kwargs: Any) -> Any:
        before = sys.exception()
        try:
            return function(*args, **kwargs)
        except Exception as exc:
            leave(exc, before)
            raise

    @wraps(function)
    async def async_guard(*args: Any, **kwargs: Any) -> Any:
        before = sys.exception()
        try:
            return await function(*args, **kwargs)
        except Exception as exc:
            leave(exc, before)
            raise

    return cast("F", async_guard if inspect.iscoroutinefunction(function) else guard)


def unwrapped(function: F) -> F:
    """Mark a method that needs no guard, or has its own: a wrapper slows a read."""
    function.__dict__["unwrapped"] = True
    return function


def guard_methods(kind: C, names: Iterable[str]) -> C:
    """Guard the methods of these names that a class itself defines."""
    for name in names:
        method = vars(kind).get(name)
        if inspect.isfunction(method):
            if "unwrapped" not in vars(method):
                setattr(kind, name, guarded(method))
        elif isinstance(method, classmethod):
            setattr(kind, name, classmethod(guarded(method.__func__)))
    return kind


def guard_public_methods(kind: C) -> C:
    """Decorate a class so that its constructor and public methods are guarded."""
    public = [name for name in vars(kind) if not name.startswith("_")]
    return guard_methods(kind, ["__init__", *public])


def clear(
    error: BaseException, *, before: BaseException | None = None
) -> list[BaseException]:
    """Clear the finished frames of an error and its causes, and return these errors.

    `before` is the error that was being handled when the work began: it and its causes
    belong to the caller.
    """
    cleared: list[BaseException] = []
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is None or each is before or any(each is known for known in cleared):
            continue
        cleared.append(each)
        if each.__suppress_context__ and each.__cause__ is None:
            # It isn't shown, but it may quote contents.
            each.__context__ = None
        found += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions
        link = each.__traceback__
        while link is not None:
            _empty(link.tb_frame)
            link = link.tb_next
    return cleared


def leave(error: BaseException, before: BaseException | None = None) -> None:
    """Clear the frames of an error and its causes before it is raised again.

    Errors of databases and codecs, whose text may quote values, keep only what is safe.
    """
    for each in clear(error, before=before):
        if isinstance(each, Error):
            each.args = (Told(_facts(each)),)
            if each.__context__ is each.__cause__:
                each.__context__ = None
            each.__cause__ = None
        elif isinstance(each, UnicodeEncodeError | UnicodeDecodeError):
            # What was to be encoded, of which Django shows a part.
            nothing: Any = type(each.object)()
            each.args = (each.encoding, nothing, each.start, each.end, each.reason)
            each.object = nothing
    drop_frame(error)


def drop_frame(error: BaseException) -> None:
    """Remove the frame of the function that caught an error from its traceback.

    That function is still running, so clear() can't clear its frame.
    """
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


def place_of(error: BaseException) -> str:
    """Return an error's class and the line that raised it, for a message."""
    link = error.__traceback__
    while link is not None and link.tb_next is not None:
        link = link.tb_next
    name = type(error).__name__
    if link is None:
        return name
    return f"{name} in {link.tb_frame.f_code.co_filename}, line {link.tb_lineno}"


def _empty(frame: FrameType) -> None:
    # Before Python 3.13, clear() ends a coroutine that waits. The collector follows
    # the code of frames that have ended only, so that others stay as they are.
    if sys.version_info >= (3, 13) or frame.f_code in gc.get_referents(frame):
        with suppress(RuntimeError):
            frame.clear()


# -- databases -------------------------------------------------------------------------


class Told(str):
    """The part of an error's text that is safe to show."""

    __slots__ = ()


def told(error: BaseException) -> str:
    """Return the kind and cause of a database error, without any values.

    "IntegrityError: 23514, constraint item_text_check of table item", for example: as
    much as tells the cause, since the error itself is not chained.
    """
    facts = _facts(error)
    return f"{type(error).__name__}: {facts}" if facts else type(error).__name__


@contextmanager
def as_storage_error(using: str, what: str) -> Iterator[None]:
    """Raise StorageError if the database fails; `what` says what it was asked to do."""
    try:
        yield
    except Error as exc:
        raise storage_error_of(exc)(
            f"The database {using!r} refused to {what} ({told(exc)}). See that it is "
            "up, migrated and reachable, then try again."
        ) from None


def storage_error_of(exc: Exception) -> type[StorageError]:
    """Return StoreUnavailable for a database that may be back soon, or StorageError."""
    is_away = isinstance(exc, InterfaceError | OperationalError)
    return StoreUnavailable if is_away else StorageError


def _facts(error: BaseException) -> str:
    """Return the safe part of a database error beside its class, or ""."""
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
