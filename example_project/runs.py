"""The demo's agent over HTTP."""

from __future__ import annotations

from functools import cache
from typing import Any

from agent_sessions.streams import AgentRunView


class SupportRuns(AgentRunView):
    """Build the agent at the first request: commands read the routes as well."""

    def get_agent(self) -> Any:
        return _agent()


@cache
def _agent() -> Any:
    # Importing it imports the SDK, which takes seconds.
    from example_project.support import build_support_agent

    return build_support_agent()
