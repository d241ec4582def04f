"""Runs that outlive the socket which asked for them."""

from __future__ import annotations

from agent_sessions.runs.log import Frame, Subscription
from agent_sessions.runs.manager import RunManager, get_run_manager
from agent_sessions.runs.setup import Conversation, RunLimits, RunSetup, find_agent

__all__ = [
    "Conversation",
    "Frame",
    "RunLimits",
    "RunManager",
    "RunSetup",
    "Subscription",
    "find_agent",
    "get_run_manager",
]
