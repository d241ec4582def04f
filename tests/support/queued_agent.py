"""An application whose runs are done by workers: an agent that speaks when it may."""

from __future__ import annotations

import os

import django

django.setup()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.urls import path  # noqa: E402

from agent_sessions.consumers import AgentConsumer  # noqa: E402

os.environ.setdefault("AGENT_SESSIONS_TEST_GRACE", "0")

route = path(
    "ws/agents/<str:session_id>/",
    AgentConsumer.as_asgi(agent="tests.support.served_agent.agent", where="task"),
)
application = ProtocolTypeRouter(
    {
        "http": get_asgi_application(),
        "websocket": AuthMiddlewareStack(URLRouter([route])),
    }
)
