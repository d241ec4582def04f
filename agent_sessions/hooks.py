"""Asking what a project has overridden, whatever that raises."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import DatabaseError, InterfaceError, OperationalError
from django.utils.translation import get_supported_language_variant

from agent_sessions.agui import FrameError
from agent_sessions.exceptions import AgentSessionError, StoreUnavailable

logger = logging.getLogger("agent_sessions.hooks")

# What a database says that is away: asking again may help.
AWAY = (InterfaceError, OperationalError, StoreUnavailable)


class HookFailed(Exception):
    """A project's method has raised `error`, which asking again won't mend."""

    def __init__(self, error: BaseException) -> None:
        """Keep what was raised, for the log."""
        super().__init__(type(error).__name__)
        self.error = error if isinstance(error, Exception) else self


def may_be_back(exc: Exception, what: str, log: logging.Logger) -> bool:
    """Log what has ended a socket or a stream; return whether a client comes again.

    Only what the project's code has raised needs a traceback.
    """
    if isinstance(exc, AgentSessionError | DatabaseError | OSError):
        log.warning("A %s was closed (%s)", what, type(exc).__name__)
        return True
    error = exc.error if isinstance(exc, HookFailed) else exc
    log.error("A %s broke (%s)", what, type(error).__name__, exc_info=error)
    return False


async def ask(hook: Callable[..., Any], *args: Any) -> Any:
    """Return what a hook gives, be it plain or async.

    Raises HookFailed for whatever it raises, unless that says that a database is away.
    """
    try:
        answer = hook(*args)
        return await answer if inspect.isawaitable(answer) else answer
    except (FrameError, *AWAY):
        raise
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Of a task that the hook has waited for: nobody cancels this one.
        raise HookFailed(exc) from None
    except Exception as exc:
        raise HookFailed(exc) from None


async def is_granted(hook: Callable[..., Any], *args: Any) -> bool:
    """Return what a hook says of a permission; PermissionDenied is a no."""
    try:
        return bool(await ask(hook, *args))
    except HookFailed as exc:
        if isinstance(exc.error, PermissionDenied):
            return False
        raise


async def supported(hook: Callable[[], Any], default: str) -> str:
    """Return the language that a hook chooses; the default where that is none."""
    try:
        return get_supported_language_variant(await ask(hook))
    except LookupError:
        return default
    except Exception as exc:
        name = type(exc.error if isinstance(exc, HookFailed) else exc).__name__
        logger.error("get_language() failed (%s); the reader's is taken", name)
        return default
