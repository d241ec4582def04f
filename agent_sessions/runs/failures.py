"""What a client and a developer are told of a run or a frame that fails."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import DatabaseError
from django.http import JsonResponse
from django.utils.translation import gettext, override
from django.utils.translation import gettext_lazy as _

from agent_sessions.agui.content import clean
from agent_sessions.exceptions import (
    AgentSessionError,
    BranchesUnsupported,
    InterruptExpired,
    InterruptsPending,
    InvalidApproval,
    InvalidBranch,
    SessionBusy,
    StorageError,
    UnknownInterrupt,
    UnknownMessage,
    UnreadableState,
)
from agent_sessions.reports import leave

MESSAGES = {
    "bad_request": _("This message could not be understood."),
    "session_busy": _("Another answer is still being written in this conversation."),
    "interrupts_pending": _("An approval is waiting. Answer it before you write on."),
    "unknown_interrupt": _("This approval is not open, or not all were answered."),
    "interrupt_expired": _("The time to approve this is over. Ask again."),
    "invalid_approval": _("This approval was changed. Nothing was done. Ask again."),
    "outdated_approval": _(
        "The agent has changed since it asked. Nothing was done. Ask again."
    ),
    "unknown_message": _("This message is not in this conversation any more."),
    "unknown_branch": _("This version is not in this conversation any more."),
    "branches_unsupported": _("This conversation keeps no versions of a message."),
    "rate_limited": _("Too many messages in a short time. Wait a minute."),
    "message_too_long": _("This message is too long."),
    "max_turns": _("The agent needed too many steps. Write on to let it continue."),
    "guardrail": _("The agent may not answer this."),
    "model_error": _("The model could not answer. Try again."),
    "timeout": _("The answer took too long. Try again."),
    "interrupted": _("The answer was interrupted. Try again."),
    "internal": _("Something went wrong. Try again."),
}
# What HTTP refuses before there is a run, and what ends a stream that is open.
REFUSALS = {
    "bad_cursor": _("This page of the list isn't there any more. Load the list again."),
    "not_logged_in": _("You are not logged in."),
    "forbidden": _("This agent is not open to you."),
    "not_found": _("This conversation does not exist."),
    "method_not_allowed": _("This can't be done here."),
    "too_large": _("This message is too large."),
    "unavailable": _("The conversations can't be reached now. Try again later."),
    "unreadable": _("This conversation can't be opened now."),
}


def message_for(code: str) -> str:
    """Return the sentence for a code, in the active language."""
    return str(MESSAGES.get(code) or REFUSALS.get(code, MESSAGES["internal"]))


def refusal(
    code: str, status: int, language: str, headers: dict[str, str] | None = None
) -> JsonResponse:
    """Return an answer of HTTP that says why there is no other, in a language."""
    with override(language):
        words = {"code": code, "message": message_for(code)}
    return JsonResponse(words, status=status, headers=headers)


def question_for(tool: str) -> str:
    """Return the question of an approval, in the active language."""
    return gettext("May %(tool)s be called?") % {"tool": tool}


def in_words(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event with our sentences in the active language.

    A run's events are made once, and read in the language of each socket.
    """
    if event["type"] == "RUN_ERROR":
        return {**event, "message": message_for(event["code"])}
    outcome = event.get("outcome", {})
    if "interrupts" not in outcome:
        return event
    asked = [
        {**each, "message": clean(question_for(each["metadata"]["toolName"]))}
        for each in outcome["interrupts"]
    ]
    return {**event, "outcome": {**outcome, "interrupts": asked}}


def refusal_code(exc: Exception) -> str | None:
    """Return the code of an error that refuses a run before it starts.

    None says that a store or a database is away, and that a client tries again.
    """
    codes: dict[type[Exception], str] = {
        SessionBusy: "session_busy",
        InterruptsPending: "interrupts_pending",
        UnknownInterrupt: "unknown_interrupt",
        InterruptExpired: "interrupt_expired",
        InvalidApproval: "invalid_approval",
        UnreadableState: "outdated_approval",
        UnknownMessage: "unknown_message",
        InvalidBranch: "unknown_branch",
        BranchesUnsupported: "branches_unsupported",
        StorageError: "internal",
    }
    away = None if isinstance(exc, AgentSessionError | DatabaseError) else "internal"
    return next((code for kind, code in codes.items() if isinstance(exc, kind)), away)


def failure_code(exc: BaseException) -> str:
    """Return the code of an error that ended a run."""
    from agents import exceptions as sdk
    from openai import APIError

    if isinstance(exc, InvalidApproval | UnreadableState):
        return refusal_code(exc) or "internal"
    if isinstance(exc, sdk.MaxTurnsExceeded):
        return "max_turns"
    if isinstance(
        exc,
        sdk.InputGuardrailTripwireTriggered
        | sdk.OutputGuardrailTripwireTriggered
        | sdk.ToolInputGuardrailTripwireTriggered
        | sdk.ToolOutputGuardrailTripwireTriggered
        # The model's own guardrail.
        | sdk.ModelRefusalError,
    ):
        return "guardrail"
    if isinstance(exc, sdk.ModelTimeoutError | sdk.ToolTimeoutError):
        return "timeout"
    if isinstance(exc, sdk.ModelBehaviorError | APIError):
        return "model_error"
    return "internal"


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
    about = {"run_id": run_id, "error_code": code, "error_type": type(exc).__name__}
    if logs_tracebacks():
        logger.error(*args, exc_info=exc, extra=about)
    else:
        logger.warning(*args, extra=about)


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
            extra={"run_id": run.run_id, "error_type": type(error).__name__},
        )
