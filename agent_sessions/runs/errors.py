"""What a client is told when a run or a frame fails: a code and our own words."""

from __future__ import annotations

from django.utils.translation import gettext_lazy as _

from agent_sessions.exceptions import (
    InterruptExpired,
    InterruptsPending,
    InvalidApproval,
    SessionBusy,
    StorageError,
    UnknownInterrupt,
    UnreadableState,
)

MESSAGES = {
    "bad_request": _("This message could not be understood."),
    "session_busy": _("Another answer is still being written in this conversation."),
    "interrupts_pending": _("An approval is waiting. Answer it before you write on."),
    "unknown_interrupt": _("This approval is not open, or not all were answered."),
    "interrupt_expired": _("The time to approve this is over. Ask again."),
    "invalid_approval": _("This approval was changed. Nothing was done. Ask again."),
    "rate_limited": _("Too many messages in a short time. Wait a minute."),
    "message_too_long": _("This message is too long."),
    "max_turns": _("The agent needed too many steps. Write on to let it continue."),
    "guardrail": _("The agent may not answer this."),
    "model_error": _("The model could not answer. Try again."),
    "timeout": _("The answer took too long. Try again."),
    "interrupted": _("The answer was interrupted. Try again."),
    "internal": _("Something went wrong. Try again."),
}


def message_for(code: str) -> str:
    """Return the sentence for a code, in the active language."""
    return str(MESSAGES.get(code, MESSAGES["internal"]))


def refusal_code(exc: Exception) -> str | None:
    """Return the code of an error that refuses a run before it starts."""
    codes: dict[type[Exception], str] = {
        SessionBusy: "session_busy",
        InterruptsPending: "interrupts_pending",
        UnknownInterrupt: "unknown_interrupt",
        InterruptExpired: "interrupt_expired",
        InvalidApproval: "invalid_approval",
        UnreadableState: "internal",
        StorageError: "internal",
    }
    return next((code for kind, code in codes.items() if isinstance(exc, kind)), None)


def failure_code(exc: BaseException) -> str:
    """Return the code of an error that ended a run."""
    from agents import exceptions as sdk
    from openai import APIError

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
