"""What system checks say, whoever's words they quote."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.core.checks import CheckMessage

from agent_sessions.characters import printable

Check = Callable[..., list[CheckMessage]]


def printed(check: Check) -> Check:
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
