"""The chat page as an app, for its templates and static files."""

from __future__ import annotations

from django.apps import AppConfig


class ChatConfig(AppConfig):
    """The app of the chat page."""

    name = "example_project.chat"
    label = "chat"
