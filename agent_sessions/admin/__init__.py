"""The conversations in Django's admin."""

from __future__ import annotations

from agent_sessions.admin.lists import CappedPaginator
from agent_sessions.admin.runs import AgentRunAdmin
from agent_sessions.admin.sessions import AgentSessionAdmin

__all__ = ["AgentRunAdmin", "AgentSessionAdmin", "CappedPaginator"]
