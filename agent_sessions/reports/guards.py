"""Functions whose errors leave the variables of their frames behind."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from types import FrameType
from typing import Any, TypeVar, cast

from django.db import Error

from agent_sessions.reports.databases import Told, facts_of

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def guarded(function: F) -> F:
    """Decorate a function so that its errors carry no variables of its frames.

    Nor of what it called, libraries too. Files and lines stay. Unlike Django's
    sensitive_variables(), it holds for every report, and where DEBUG is on.
    """
    guard = _async_guard if inspect.iscoroutinefunction(function) else _guard
    return cast("F", guard(function))


def unwrapped(function: F) -> F:
    """Mark a method that guards itself, or needn't: a read, which a wrapper slows."""
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
    """Decorate a class so that its public methods, and how it is made, are guarded."""
    public = [name for name in vars(kind) if not name.startswith("_")]
    return guard_methods(kind, ["__init__", *public])


def clear(
    error: BaseException, *, before: BaseException | None = None
) -> list[BaseException]:
    """Empty the frames that an error and its causes came through, those that ended.

    Return the errors. `before` is the one that was being handled when the work began:
    it, and what caused it, are the caller's.
    """
    cleared: list[BaseException] = []
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is None or each is before or any(each is known for known in cleared):
            continue
        cleared.append(each)
        if each.__suppress_context__ and each.__cause__ is None:
            # Nobody shows it, but it may quote contents.
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
    """Make an error fit to leave the function that has caught it; see clear().

    Those of databases and codecs, whose text may quote values, keep what may be told.
    """
    for each in clear(error, before=before):
        if isinstance(each, Error):
            each.args = (Told(facts_of(each)),)
            if each.__context__ is each.__cause__:
                each.__context__ = None
            each.__cause__ = None
        elif isinstance(each, UnicodeEncodeError | UnicodeDecodeError):
            _withhold(each)
    drop_frame(error)


def _withhold(error: UnicodeEncodeError | UnicodeDecodeError) -> None:
    """Keep what was to be encoded, of which Django shows a part, from reports."""
    nothing: Any = type(error.object)()
    error.args = (error.encoding, nothing, error.start, error.end, error.reason)
    error.object = nothing


def drop_frame(error: BaseException) -> None:
    """Take the frame of the function that has caught an error out of its traceback.

    It is still running, so that clear() can't empty it.
    """
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


def place_of(error: BaseException) -> str:
    """Name an error's class and the line that raised it, for a message of ours."""
    link = error.__traceback__
    while link is not None and link.tb_next is not None:
        link = link.tb_next
    name = type(error).__name__
    if link is None:
        return name
    return f"{name} in {link.tb_frame.f_code.co_filename}, line {link.tb_lineno}"


def _guard(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guard(*args: Any, **kwargs: Any) -> Any:
        before = sys.exception()
        try:
            return function(*args, **kwargs)
        except Exception as exc:
            leave(exc, before)
            raise

    return guard


def _async_guard(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def guard(*args: Any, **kwargs: Any) -> Any:
        before = sys.exception()
        try:
            return await function(*args, **kwargs)
        except Exception as exc:
            leave(exc, before)
            raise

    return guard


def _empty(frame: FrameType) -> None:
    # Before Python 3.13, clear() ends a coroutine that waits. The collector follows
    # the code of frames that have ended only, so that others stay as they are.
    if sys.version_info >= (3, 13) or frame.f_code in gc.get_referents(frame):
        with suppress(RuntimeError):
            frame.clear()
