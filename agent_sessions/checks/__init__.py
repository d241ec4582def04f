"""System checks: every mistake in the settings, each with a hint and an id.

docs/checks.md has the table of ids.
"""

from __future__ import annotations

from agent_sessions.checks.backends import (
    check_backends,
    check_databases,
    check_session_classes,
)
from agent_sessions.checks.deployment import check_deployment
from agent_sessions.checks.secrets import check_layers, check_shown_passwords

__all__ = [
    "check_backends",
    "check_databases",
    "check_deployment",
    "check_layers",
    "check_session_classes",
    "check_shown_passwords",
]
