"""The app, as INSTALLED_APPS names it."""

from __future__ import annotations

from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.core.signals import setting_changed
from django.db.backends.signals import connection_created
from django.db.models.signals import pre_delete
from django.utils.translation import gettext_lazy as _


class AgentSessionsConfig(AppConfig):
    """The app: its checks, its signals, and what it does when a process forks."""

    name = "agent_sessions"
    verbose_name = _("Agent sessions")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect signals and register the checks."""
        from agent_sessions.checks import (
            check_backends,
            check_databases,
            check_deployment,
            check_layers,
            check_session_classes,
            check_shown_passwords,
        )
        from agent_sessions.concurrency.forks import remember_connection
        from agent_sessions.handler import reset_backends
        from agent_sessions.models import AgentSession
        from agent_sessions.retention.pending import on_delete
        from agent_sessions.retention.removal import finish_later

        checks.register(check_backends)
        checks.register(check_databases, checks.Tags.database)
        checks.register(check_deployment, deploy=True)
        checks.register(check_layers)
        checks.register(check_session_classes, deploy=True)
        checks.register(check_shown_passwords, deploy=True)
        connection_created.connect(remember_connection)
        setting_changed.connect(reset_backends)
        pre_delete.connect(on_delete, sender=AgentSession)
        pre_delete.connect(finish_later, sender=settings.AUTH_USER_MODEL)
