"""An application for the servers that tests stop: an agent that speaks when it may.

It says three words of its answer, waits until the file that AGENT_SESSIONS_TEST_GATE
names is there, and says the rest.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import django

django.setup()

from agents import Agent  # noqa: E402
from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.urls import path  # noqa: E402

from agent_sessions.consumers import AgentConsumer  # noqa: E402
from agent_sessions.runs import RunLimits, with_shutdown  # noqa: E402
from tests.support.gated import GatedModel  # noqa: E402

GATE = Path(os.environ["AGENT_SESSIONS_TEST_GATE"])
GRACE = float(os.environ["AGENT_SESSIONS_TEST_GRACE"])


class FileGatedModel(GatedModel):
    """Opens its gate as soon as the file is there."""

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        opening = asyncio.create_task(self._open())
        try:
            async for event in super().stream_response(*args, **kwargs):
                yield event
        finally:
            opening.cancel()

    async def _open(self) -> None:
        while not GATE.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)
        self.gate.set()


agent: Agent[Any] = Agent(
    name="speaker", model=FileGatedModel("one two three four five", pause_at=3)
)
route: Any = path(
    "ws/agents/<str:session_id>/",
    AgentConsumer.as_asgi(agent=agent, limits=RunLimits(grace=GRACE)),
)
application = with_shutdown(
    ProtocolTypeRouter(
        {
            "http": get_asgi_application(),
            "websocket": AuthMiddlewareStack(URLRouter([route])),
        }
    )
)
