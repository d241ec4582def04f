"""Filters of the list that cost no query."""

from __future__ import annotations

from typing import Any

from django.contrib.admin import SimpleListFilter
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from agent_sessions.handler import sessions


class StoreFilter(SimpleListFilter):
    """Filter by alias; those of the settings, as finding the used ones scans all."""

    title = _("store")
    parameter_name = "backend"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        aliases = list(sessions)
        return [(alias, alias) for alias in aliases] if len(aliases) > 1 else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        alias = self.value()
        return queryset if alias is None else queryset.filter(backend=alias)
