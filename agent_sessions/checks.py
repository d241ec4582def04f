"""System checks: every mistake in the settings, with a hint."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error

from agent_sessions.exceptions import AgentSessionError


def check_backends(**kwargs: Any) -> list[CheckMessage]:
    """Build each configured backend and ask it for its own findings."""
    from agent_sessions.handler import sessions

    messages: list[CheckMessage] = []
    try:
        aliases = list(sessions)
    except AgentSessionError as exc:
        return [Error(str(exc), id="agent_sessions.E001")]
    for alias in aliases:
        try:
            messages += sessions[alias].check()
        except AgentSessionError as exc:
            messages.append(Error(str(exc), id="agent_sessions.E001"))
    return messages


def check_deployment(**kwargs: Any) -> list[CheckMessage]:
    """Report what is fine on a developer's machine only."""
    return []
