"""Every sentence that the page's scripts say."""

from __future__ import annotations

from django.utils.translation import gettext as _


def strings() -> dict[str, str]:
    """Return the sentences in the visitor's language; braces are filled in there."""
    return {**_page(), **_answers(), **_approvals(), **_connection(), **_errors()}


def _page() -> dict[str, str]:
    return {
        "new": _("New conversation"),
        "untitled": _("Untitled conversation"),
        "delete": _("Delete {title}"),
        "deleteAsk": _("Delete “{title}” and everything in it? This can't be undone."),
        "deleted": _("The conversation is deleted."),
        "listEmpty": _("Your conversations will be listed here."),
        "listFailed": _("Your conversations couldn't be loaded."),
        "earlierFailed": _("Earlier messages couldn't be loaded. Try again."),
        "createFailed": _("The conversation couldn't be started. Try again."),
        "deleteFailed": _("The conversation couldn't be deleted. Try again."),
        "deleteBusy": _("Stop the answer first, then delete."),
        "stateRunning": _("answering"),
        "stateWaiting": _("waiting for you"),
        "themeAuto": _("Colours: as on this device"),
        "themeLight": _("Colours: light"),
        "themeDark": _("Colours: dark"),
    }


def _answers() -> dict[str, str]:
    return {
        "you": _("You"),
        "assistant": _("Assistant"),
        "answering": _("{agent} is answering…"),
        "answeringElsewhere": _("Answering in another tab…"),
        "answered": _("Answer complete."),
        "busy": _("Wait for the answer, or stop it with Esc."),
        "tooLong": _("The message is too long: {count} characters. Send it in parts."),
        "stopping": _("Stopping…"),
        "stopped": _("Stopped."),
        "toolRunning": _("running"),
        "toolDone": _("done"),
        "toolWaiting": _("waits for approval"),
        "toolOpen": _("not finished"),
        "toolArguments": _("Arguments"),
        "toolResult": _("Result"),
        "reasoning": _("Thoughts"),
        "handoff": _("{agent} takes over"),
        "usage": _("{input} tokens read, {output} written"),
        "copy": _("Copy"),
        "copied": _("Copied"),
        "copyFailed": _("Not copied"),
        "picture": _("[picture]"),
        "newMessages": _("New messages"),
        "edit": _("Edit this message"),
        "editLabel": _("Your message, to ask anew"),
        "send": _("Send"),
        "cancel": _("Cancel"),
        "version": _("Version {place} of {count}"),
        "versionShort": _("{place} / {count}"),
        "previousVersion": _("Previous version"),
        "nextVersion": _("Next version"),
    }


def _approvals() -> dict[str, str]:
    return {
        "approvalTitle": _("May I call {tool}?"),
        "approve": _("Approve"),
        "refuse": _("Refuse"),
        "reason": _("Reason for refusing (optional)"),
        "expires": _("The request expires {when}."),
        "expired": _("The request has expired."),
        "approvalWaiting": _("Answer the request above to go on."),
        "approvalsLeft": _("Answer all requests above to go on: {count} left."),
        "approved": _("Approved"),
        "refused": _("Refused"),
    }


def _connection() -> dict[str, str]:
    return {
        "connecting": _("Connecting…"),
        "reconnecting": _("Connection lost. Trying again in {seconds} s."),
        "offline": _("This device is offline. The page connects when it's back."),
        "closed1000": _("The server ended the connection. Reload the page to go on."),
        "closed1009": _("The last message was too large for the server."),
        "closed4400": _("The server didn't understand this page. Reload it."),
        "closed4401": _("You are logged out."),
        "closed4403": _("This agent isn't open to you."),
        "closed4404": _("This conversation doesn't exist."),
        "closed4413": _("The last message was too large for the server."),
        "closed4429": _("Too many tabs or messages. Trying again in {seconds} s."),
        "closed4500": _("Something went wrong on the server. Try again later."),
        "closed4503": _("The server restarts. Trying again in {seconds} s."),
    }


def _errors() -> dict[str, str]:
    return {
        "retry": _("Retry"),
        "error_bad_request": _("The server didn't understand the request."),
        "error_session_busy": _("Another answer is still being written. Wait for it."),
        "error_interrupts_pending": _("A request waits for your approval first."),
        "error_unknown_interrupt": _("That request was already answered."),
        "error_interrupt_expired": _("That request has expired. Ask again."),
        "error_invalid_approval": _("That request was changed. Ask again."),
        "error_outdated_approval": _("The agent has changed meanwhile. Ask again."),
        "error_unknown_message": _("That message isn't here any more."),
        "error_unknown_branch": _("That version isn't here any more."),
        "error_branches_unsupported": _("This conversation keeps no versions."),
        "error_rate_limited": _("That was a lot in a short time. Wait a minute."),
        "error_message_too_long": _("The message is too long."),
        "error_max_turns": _("The agent didn't come to an end and was stopped."),
        "error_guardrail": _("The agent may not answer that."),
        "error_model_error": _("The model couldn't be reached or gave no answer."),
        "error_timeout": _("The answer took too long and was stopped."),
        "error_interrupted": _("The server stopped in the middle of the answer."),
        "error_unanswered": _("The server didn't answer several times. Try later."),
        "error_internal": _("Something went wrong on the server."),
    }
