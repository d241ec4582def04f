"""The overview: what happened lately, drawn and as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.utils.formats import date_format
from django.utils.translation import gettext as _

from agent_sessions.admin.charts import HEIGHT, WIDTH, Chart, bar_chart
from agent_sessions.admin.formatting import grouped
from agent_sessions.admin.permissions import MOST_ASKED, has_own, narrowed, registered
from agent_sessions.admin.runs import AgentRunAdmin, waiting_text
from agent_sessions.admin.session_rules import SessionRules
from agent_sessions.admin.statistics import Source, Statistics, Tally, gather
from agent_sessions.admin.transcript import runs_url
from agent_sessions.models import AgentRun, AgentSession

# How many days the page can look back; the first is what it shows unasked.
RANGES = (30, 7, 14)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its words."""

    id: str
    title: str
    total: str
    highest: str
    chart: Chart


@dataclass(frozen=True, slots=True)
class Table:
    """A table of counts: heads, and rows that each begin with a name."""

    id: str
    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, list[str]]]
    note: str = ""


class OverviewMixin(SessionRules):
    """A page of charts, for those who may see that sessions exist."""

    def overview_view(self, request: HttpRequest) -> TemplateResponse:
        """Show the last days: sessions, runs, tokens, errors and open approvals."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        asked = request.GET.get("days", "")
        length = next((n for n in RANGES if str(n) == asked), RANGES[0])
        found = gather(length, self._source(request))
        context = {
            **self.admin_site.each_context(request),
            "title": _("Overview of agent sessions"),
            "opts": self.opts,
            "media": self.media,
            "figures": _figures(found),
            "tables": [table for table in _tables(found) if table.rows],
            "waiting": waiting_text(found.waiting_now) if found.waiting_now else "",
            "ranges": [(n, n == length) for n in sorted(RANGES)],
            "first": found.days[0][0],
            "last": found.days[-1][0],
            "size": f"0 0 {WIDTH} {HEIGHT}",
            "runs_url": runs_url(self, request),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request, "admin/agent_sessions/agentsession/overview.html", context
        )

    def _source(self, request: HttpRequest) -> Source:
        """Return the rows that are counted: those that the reader may view."""
        sessions = narrowed(self, request)
        if self.asks_rows():
            rows = self.get_queryset(request).select_related("user")
            asked = list(rows[: MOST_ASKED + 1])
            if len(asked) > MOST_ASKED:
                raise PermissionDenied(
                    f"has_view_permission() is asked for {MOST_ASKED} sessions at "
                    "most. Narrow get_queryset() instead."
                )
            keys: Any = [row.pk for row in self.shown(request, asked)]
            sessions = AgentSession.objects.filter(pk__in=keys)
        source = Source()
        if sessions is not None:
            keys = sessions.values("pk")
            source = Source(sessions, source.runs.filter(session_id__in=keys))
        admin_of_runs = registered(self, AgentRun)
        if admin_of_runs and has_own(admin_of_runs, "get_queryset", AgentRunAdmin):
            keys = admin_of_runs.get_queryset(request).order_by().values("pk")
            source = Source(source.sessions, source.runs.filter(pk__in=keys))
        return source


def _figures(found: Statistics) -> list[Figure]:
    def figure(
        name: str, title: str, values: Callable[[Tally], tuple[int, ...]]
    ) -> Figure:
        stacks = [values(tally) for _day, tally in found.days]
        chart = bar_chart(stacks, _labels(found.days, stacks))
        total = sum(map(sum, stacks))
        return Figure(name, title, grouped(total), grouped(chart.highest), chart)

    return [
        figure("sessions", _("Sessions"), lambda day: (day.sessions,)),
        figure("runs", _("Runs"), lambda day: (day.runs,)),
        figure(
            "tokens", _("Tokens"), lambda day: (day.input_tokens, day.output_tokens)
        ),
        figure("errors", _("Errors"), lambda day: (day.errors,)),
        figure("waiting", _("Waiting approvals"), lambda day: (day.waiting,)),
    ]


def _tables(found: Statistics) -> list[Table]:
    of_runs = (_("Runs"), _("Tokens in"), _("Tokens out"), _("Errors"), _("Waiting"))
    of_sessions = (_("Sessions"), _("Tokens in"), _("Tokens out"))
    days = [(_day(day), tally) for day, tally in reversed(found.days)]
    active = _(
        "Sessions that were last active in these days, with all that they have used "
        "so far."
    )
    return [
        Table(
            "days",
            _("By day"),
            (_("Day"), _("Sessions"), *of_runs),
            [
                (name, [grouped(tally.sessions), *_counts(tally)])
                for name, tally in [*days, (_("All"), found.total)]
            ],
            _(
                "A session counts on the day of its last activity, a run on the day it "
                "began."
            ),
        ),
        Table(
            "agents",
            _("By agent"),
            (_("Agent"), *of_runs),
            [(tally.name, _counts(tally)) for tally in found.agents],
        ),
        Table(
            "stores",
            _("By store"),
            (_("Store"), *of_sessions),
            [(tally.name, _used(tally)) for tally in found.backends],
            active,
        ),
        Table(
            "users",
            _("Top users by tokens"),
            (_("User"), *of_sessions),
            [(tally.name, _used(tally)) for tally in found.users],
            active,
        ),
        Table(
            "codes",
            _("Errors by code"),
            (_("Error code"), _("Runs")),
            [(code, [grouped(count)]) for code, count in found.errors],
        ),
    ]


def _counts(tally: Tally) -> list[str]:
    counts = (tally.input_tokens, tally.output_tokens, tally.errors, tally.waiting)
    return list(map(grouped, (tally.runs, *counts)))


def _used(tally: Tally) -> list[str]:
    counts = (tally.sessions, tally.input_tokens, tally.output_tokens)
    return list(map(grouped, counts))


def _day(day: date) -> str:
    return date_format(day, "SHORT_DATE_FORMAT")


def _labels(
    days: Sequence[tuple[date, Any]], stacks: Sequence[tuple[int, ...]]
) -> list[str]:
    return [
        f"{_day(day)}: {' + '.join(map(grouped, stack))}"
        for (day, _tally), stack in zip(days, stacks, strict=True)
    ]
