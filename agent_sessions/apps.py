from __future__ import annotations

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed
from django.utils.translation import gettext_lazy as _


class AgentSessionsConfig(AppConfig):
    name = "agent_sessions"
    verbose_name = _("Agent sessions")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from agent_sessions.checks import (
            check_backends,
            check_databases,
            check_deployment,
        )
        from agent_sessions.handler import reset_backends

        checks.register(check_backends)
        checks.register(check_databases, checks.Tags.database)
        checks.register(check_deployment, deploy=True)
        setting_changed.connect(reset_backends)
