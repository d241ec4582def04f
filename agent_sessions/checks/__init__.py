"""System checks: every mistake in the settings, each with a hint and an id.

docs/checks.md has the table of ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.core.checks import CheckMessage

from agent_sessions.characters import printable
from agent_sessions.checks import deployment, settings

Check = Callable[..., list[CheckMessage]]


def _printed(check: Check) -> Check:
    """Make a check's messages of one line each of what may be printed.

    Django's own `check` command prints them, too, and they quote settings, the errors
    of other people's modules and what lies in stores.
    """

    @wraps(check)
    def clean(*args: Any, **kwargs: Any) -> list[CheckMessage]:
        messages = check(*args, **kwargs)
        for message in messages:
            message.msg = printable(message.msg)
            message.hint = message.hint and printable(message.hint)
        return messages

    return clean


check_backends = _printed(settings.check_backends)
check_databases = _printed(settings.check_databases)
check_deployment = _printed(deployment.check_deployment)
check_layers = _printed(settings.check_layers)
check_session_classes = _printed(settings.check_session_classes)
check_shown_passwords = _printed(settings.check_shown_passwords)
