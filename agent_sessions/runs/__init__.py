"""Runs that outlive the socket which asked for them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_sessions.runs.log import Frame, Subscription
from agent_sessions.runs.manager import RunManager, get_run_manager
from agent_sessions.runs.setup import Conversation, RunLimits, RunSetup, find_agent

if TYPE_CHECKING:
    from agent_sessions.runs.api import (
        Run,
        SyncRun,
        answer_run,
        answer_run_sync,
        start_run,
        start_run_sync,
    )
    from agent_sessions.runs.holding import hold
    from agent_sessions.runs.shutdown import with_shutdown

# Resolved on first use: hold() imports the SDK, which takes seconds.
_EXPORTS = {
    "answer_run": "agent_sessions.runs.api",
    "answer_run_sync": "agent_sessions.runs.api",
    "Run": "agent_sessions.runs.api",
    "SyncRun": "agent_sessions.runs.api",
    "hold": "agent_sessions.runs.holding",
    "start_run": "agent_sessions.runs.api",
    "start_run_sync": "agent_sessions.runs.api",
    "with_shutdown": "agent_sessions.runs.shutdown",
}

__all__ = [
    "Conversation",
    "Frame",
    "Run",
    "RunLimits",
    "RunManager",
    "RunSetup",
    "Subscription",
    "SyncRun",
    "answer_run",
    "answer_run_sync",
    "find_agent",
    "get_run_manager",
    "hold",
    "start_run",
    "start_run_sync",
    "with_shutdown",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
