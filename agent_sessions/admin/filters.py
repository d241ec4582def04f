"""Filters of the lists that cost no query and that an index serves."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib.admin import DateFieldListFilter, SimpleListFilter
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.dateparse import parse_datetime
from django.utils.timezone import is_aware
from django.utils.translation import gettext_lazy as _

from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun
from agent_sessions.times import day_of


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


class ActivityFilter(DateFieldListFilter):
    """Filter sessions by their last activity, in the reader's days.

    The index has the day that day_of() gives: it narrows, the time decides.
    """

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        found: QuerySet[Any] = super().queryset(request, queryset)  # type: ignore[assignment]
        for bound in ("gte", "lt"):
            given: Any = self.used_parameters.get(f"{self.field_path}__{bound}", ())
            for text in given:
                when = parse_datetime(str(text))
                if when is not None and is_aware(when) == settings.USE_TZ:
                    day = "active_on__gte" if bound == "gte" else "active_on__lte"
                    found = found.filter(**{day: day_of(when)})
        return found


class StartedFilter(SimpleListFilter):
    """Filter runs by when they began, in a way that the index serves."""

    title = _("started")
    parameter_name = "days"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("1", _("Past 24 hours")),
            ("7", _("Past 7 days")),
            ("30", _("Past 30 days")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        days = self.value()
        if days not in {"1", "7", "30"}:
            return queryset
        # The index begins with the status.
        return queryset.filter(
            status__in=AgentRun.Status.values,
            started_at__gte=timezone.now() - timedelta(days=int(days)),
        )
