"""Serve pages over HTTP and agents over websockets."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")
http = ASGIStaticFilesHandler(get_asgi_application())

# What follows needs Django to be set up, and warms the slow import of the SDK
# before the first socket comes.
from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from channels.security.websocket import AllowedHostsOriginValidator  # noqa: E402
from django.conf import settings  # noqa: E402
from django.urls import path  # noqa: E402

from agent_sessions.consumers import AgentConsumer  # noqa: E402
from example_project.options import STREAM_OPTIONS  # noqa: E402
from example_project.support import build_support_agent  # noqa: E402

# path() is Django's and knows of views only; Channels borrows it.
consumer: Any = AgentConsumer.as_asgi(
    agent=build_support_agent(), stream_options=STREAM_OPTIONS
)
# As Django does over HTTP, take the prefix of FORCE_SCRIPT_NAME or go without: some
# proxies pass it on.
prefixes = {"", (settings.FORCE_SCRIPT_NAME or "").strip("/")}
websocket_urlpatterns: list[Any] = [
    path(f"{prefix}/ws/agents/<str:session_id>/".lstrip("/"), consumer)
    for prefix in prefixes
]

application = ProtocolTypeRouter(
    {
        "http": http,
        "websocket": AllowedHostsOriginValidator(
            AuthMiddlewareStack(URLRouter(websocket_urlpatterns))
        ),
    }
)
