"""The app, as INSTALLED_APPS names it."""

from __future__ import annotations

from django.apps import AppConfig, apps
from django.contrib.auth import get_user_model
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
        user = get_user_model()._meta.concrete_model
        for model in apps.get_models():
            # Who deletes a proxy's users names the proxy.
            if model._meta.concrete_model is user:
                pre_delete.connect(finish_later, sender=model)

    @staticmethod
    def keeps_outside(alias: str) -> bool:
        """Return whether an alias keeps its items elsewhere than in the database."""
        from agent_sessions.backends.wrapping import innermost
        from agent_sessions.exceptions import AgentSessionError
        from agent_sessions.handler import sessions

        try:
            return innermost(sessions[alias]).keeps_outside
        except AgentSessionError:
            return False
