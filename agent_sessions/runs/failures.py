"""What a developer is told of a run that failed: a log, and a hook of the project's."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING

from django.conf import settings

from agent_sessions.reports import leave

if TYPE_CHECKING:
    from agent_sessions.runs.active import ActiveRun

logger = logging.getLogger("agent_sessions.runs")

# Seconds that a hook may take.
HOOK_SECONDS = 30.0


def logs_tracebacks() -> bool:
    """Return whether errors may be logged with their text, which quotes contents."""
    chosen = getattr(settings, "AGENT_SESSIONS_LOG_TRACEBACKS", None)
    return bool(settings.DEBUG if chosen is None else chosen)


def log_failure(run_id: str, code: str, exc: Exception) -> None:
    """Log that a run failed, and where its code did if that may be logged.

    The error is made fit for reports: files and lines stay, variables don't.
    """
    leave(exc)
    # The run's id finds the row; what was said stays out of the log.
    args = ("Run %r failed: %s (%s)", run_id, code, type(exc).__name__)
    if logs_tracebacks():
        logger.error(*args, exc_info=exc)
    else:
        logger.warning(*args)


async def report_failure(run: ActiveRun, exc: Exception) -> None:
    """Call the setup's on_error, plain or async; what it raises is logged alone."""
    hook = run.setup.on_error
    if hook is None:
        return
    try:
        async with asyncio.timeout(HOOK_SECONDS):
            answer = hook(run, exc)
            if inspect.isawaitable(answer):
                await answer
    except Exception as error:
        leave(error, before=exc)
        logger.error(
            "on_error of run %r failed (%s)",
            run.run_id,
            type(error).__name__,
            exc_info=error if logs_tracebacks() else None,
        )
