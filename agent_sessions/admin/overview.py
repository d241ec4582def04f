"""The overview: what happened lately, drawn and as tables.

A few queries count over a bounded range of days.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.db.models import Case, Count, F, IntegerField, QuerySet, Sum, Value, When
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.translation import gettext as _

from agent_sessions.admin.addresses import link, registered
from agent_sessions.admin.layout import grouped
from agent_sessions.admin.lists import CappedPaginator
from agent_sessions.admin.rules import (
    MOST_ASKED,
    SessionRules,
    database,
    has_own,
    narrowed,
)
from agent_sessions.admin.runs import AgentRunAdmin, waiting_text
from agent_sessions.approvals import waiting
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.times import day_of

# How many days the page can look back; the first is what it shows unasked.
RANGES = (30, 7, 14)
# Rows of each table of names.
TOP = 10
# The size of a chart, and the part of a bar's place that stays empty.
WIDTH, HEIGHT = 600, 120
_GAP = 0.2
_DAY = timedelta(days=1)
# The index begins with the status: named all, a range of days is read from it.
_STATUSES = AgentRun.Status.values
_FAILED, _WAITING = AgentRun.Status.FAILED, AgentRun.Status.WAITING
_SUMS = {
    "count": Count("pk"),
    "given": Sum("input_tokens"),
    "made": Sum("output_tokens"),
}

# -- counting --------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What belongs to one name: a day, an agent, a store, a user.

    Agents and days count runs. Stores and users count sessions, with all that these
    have used so far: summing their runs up reads ten times as much.
    """

    name: str
    runs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0
    waiting: int = 0
    sessions: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def add(self, status: str, runs: int, given: int | None, made: int | None) -> None:
        """Count runs of one status in."""
        self.runs += runs
        self.input_tokens += given or 0
        self.output_tokens += made or 0
        self.errors += runs if status == _FAILED else 0
        self.waiting += runs if status == _WAITING else 0


@dataclass(slots=True)
class Statistics:
    """The figures of the page; days are in order, names by their tokens."""

    days: list[tuple[date, Tally]]
    total: Tally
    agents: list[Tally] = field(default_factory=list)
    backends: list[Tally] = field(default_factory=list)
    users: list[Tally] = field(default_factory=list)
    errors: list[Tally] = field(default_factory=list)
    waiting_now: int = 0


def gather(
    length: int,
    sessions: QuerySet[Any] | None = None,
    runs: QuerySet[Any] | None = None,
) -> Statistics:
    """Count what happened in the last `length` days, today among them.

    `sessions` and `runs` are those that are counted, all by default. The number of
    queries is always the same, and each reads only the range's rows.
    """
    if sessions is None:
        sessions = AgentSession.objects.using(database())
    if runs is None:
        runs = AgentRun.objects.using(database())
    today = timezone.localdate() if settings.USE_TZ else date.today()  # noqa: DTZ011
    days = [today - timedelta(days=back) for back in range(length - 1, -1, -1)]
    tallies = {day: Tally(date_format(day, "SHORT_DATE_FORMAT")) for day in days}
    agents: dict[str, Tally] = {}
    total = Tally(_("All"))
    for number, status, agent, *counts in _runs_by_day(runs, days):
        for tally in (
            tallies[days[number]],
            agents.setdefault(agent, Tally(agent)),
            total,
        ):
            tally.add(status, *counts)
    active = _active(sessions, days)
    backends = _count_sessions(active, days, tallies)
    total.sessions = sum(tally.sessions for tally in backends)
    failed = _began(runs, days[0], days[-1]).filter(status=_FAILED)
    codes = failed.values_list("error_code").annotate(count=Count("pk"))
    codes = codes.order_by("-count", "error_code")[:TOP]
    return Statistics(
        days=list(tallies.items()),
        total=total,
        agents=_top(agents.values()),
        backends=_top(backends),
        users=_top_users(active),
        errors=[Tally(code, runs=count) for code, count in codes],
        waiting_now=waiting(runs)[: CappedPaginator.limit + 1].count(),
    )


def _runs_by_day(runs: QuerySet[Any], days: list[date]) -> Iterable[tuple[Any, ...]]:
    """Sum up runs by day, status and agent.

    A day is a range of times: cutting times to days is slow, and on SQLite a call
    back into Python for every row.
    """
    first, *rest = (
        _began(runs, day, day)
        .annotate(number=Value(number))
        .values("number", "status", "agent_name")
        .annotate(**_SUMS)
        .values_list("number", "status", "agent_name", *_SUMS)
        for number, day in enumerate(days)
    )
    rows: Iterable[tuple[Any, ...]] = first.union(*rest, all=True)
    return rows


def _count_sessions(
    active: QuerySet[Any], days: list[date], tallies: dict[date, Tally]
) -> list[Tally]:
    """Count sessions by the day of their last activity, and sum them up by store."""
    backends: dict[str, Tally] = {}
    number = Case(
        *(
            When(updated_at__lt=_midnight(day + _DAY), then=Value(number))
            for number, day in enumerate(days)
        ),
        output_field=IntegerField(),
    )
    rows = active.annotate(number=number).values("number", "backend").annotate(**_SUMS)
    for index, backend, count, *used in rows.values_list("number", "backend", *_SUMS):
        tallies[days[index]].sessions += count
        tally = backends.setdefault(backend, Tally(backend))
        tally.sessions += count
        tally.add("", 0, *used)
    return list(backends.values())


def _top_users(active: QuerySet[Any]) -> list[Tally]:
    name = f"user__{get_user_model().USERNAME_FIELD}"
    tokens = Sum(F("input_tokens") + F("output_tokens"))
    rows = active.exclude(user=None).values("user_id", name)
    rows = rows.annotate(**_SUMS, tokens=tokens).order_by("-tokens", "user_id")
    return [
        Tally(str(user), sessions=count, input_tokens=given, output_tokens=made)
        for user, count, given, made in rows.values_list(name, *_SUMS)[:TOP]
    ]


def _began(runs: QuerySet[Any], first: date, last: date) -> QuerySet[Any]:
    """Return the runs that began from one day's first moment to another's last."""
    return runs.filter(
        status__in=_STATUSES,
        started_at__gte=_midnight(first),
        started_at__lt=_midnight(last + _DAY),
    ).order_by()


def _active(sessions: QuerySet[Any], days: list[date]) -> QuerySet[Any]:
    """Return the sessions that were last active in a range of the reader's days.

    The index has the day that day_of() gives: it narrows, the time decides.
    """
    since, until = _midnight(days[0]), _midnight(days[-1] + _DAY)
    return sessions.filter(
        active_on__gte=day_of(since),
        active_on__lte=day_of(until),
        updated_at__gte=since,
        updated_at__lt=until,
    ).order_by()


def _midnight(day: date) -> datetime:
    start = datetime.combine(day, time.min)
    return timezone.make_aware(start) if settings.USE_TZ else start


def _top(tallies: Iterable[Tally]) -> list[Tally]:
    return sorted(tallies, key=lambda t: (-t.tokens, -t.runs, t.name))[:TOP]


# -- the page --------------------------------------------------------------------------


class OverviewMixin(SessionRules):
    """A page of charts, for those who may see that sessions exist."""

    def overview_view(self, request: HttpRequest) -> TemplateResponse:
        """Show the last days: sessions, runs, tokens, errors and open approvals."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        asked = request.GET.get("days", "")
        length = next((n for n in RANGES if str(n) == asked), RANGES[0])
        found = gather(length, *self._counted(request))
        context = {
            **self.admin_site.each_context(request),
            "title": _("Overview of agent sessions"),
            "opts": self.opts,
            "media": self.media,
            "figures": _figures(found),
            "tables": _tables(found),
            "waiting": waiting_text(found.waiting_now) if found.waiting_now else "",
            "ranges": [(n, n == length) for n in sorted(RANGES)],
            "first": found.days[0][0],
            "last": found.days[-1][0],
            "size": f"0 0 {WIDTH} {HEIGHT}",
            "runs_url": link(self, request, AgentRun),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request, "admin/agent_sessions/agentsession/overview.html", context
        )

    def _counted(self, request: HttpRequest) -> tuple[Any, Any]:
        """Return the sessions that the reader may view, None for all, and the runs."""
        runs = AgentRun.objects.using(database())
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
        if sessions is not None:
            runs = runs.filter(session_id__in=sessions.values("pk"))
        admin_of_runs = registered(self, AgentRun)
        if admin_of_runs and has_own(admin_of_runs, "get_queryset", AgentRunAdmin):
            keys = admin_of_runs.get_queryset(request).order_by().values("pk")
            runs = runs.filter(pk__in=keys)
        return sessions, runs


def _figures(found: Statistics) -> list[dict[str, Any]]:
    tallies = [tally for _date, tally in found.days]

    def figure(name: str, title: str, *columns: str) -> dict[str, Any]:
        stacks = [
            tuple(getattr(each, column) for column in columns) for each in tallies
        ]
        labels = [
            f"{each.name}: {' + '.join(map(grouped, stack))}"
            for each, stack in zip(tallies, stacks, strict=True)
        ]
        chart = bar_chart(stacks, labels)
        return {
            "id": name,
            "title": title,
            "total": grouped(sum(map(sum, stacks))),
            "highest": grouped(chart.highest),
            "bars": chart.bars,
        }

    return [
        figure("sessions", _("Sessions"), "sessions"),
        figure("runs", _("Runs"), "runs"),
        figure("tokens", _("Tokens"), "input_tokens", "output_tokens"),
        figure("errors", _("Errors"), "errors"),
        figure("waiting", _("Waiting approvals"), "waiting"),
    ]


def _tables(found: Statistics) -> list[dict[str, Any]]:
    heads = {
        "sessions": _("Sessions"),
        "runs": _("Runs"),
        "input_tokens": _("Tokens in"),
        "output_tokens": _("Tokens out"),
        "errors": _("Errors"),
        "waiting": _("Waiting"),
    }
    used = ("input_tokens", "output_tokens")
    of_runs, of_sessions = ("runs", *used, "errors", "waiting"), ("sessions", *used)
    days = [tally for _date, tally in reversed(found.days)]
    counted = _(
        "A session counts on the day of its last activity, a run on the day it began."
    )
    active = _(
        "Sessions that were last active in these days, with all that they have used "
        "so far."
    )
    users = _("Top users by tokens")
    tables: list[tuple[Any, ...]] = [
        ("days", _("By day"), _("Day"), heads, [*days, found.total], counted),
        ("agents", _("By agent"), _("Agent"), of_runs, found.agents, ""),
        ("stores", _("By store"), _("Store"), of_sessions, found.backends, active),
        ("users", users, _("User"), of_sessions, found.users, active),
        ("codes", _("Errors by code"), _("Error code"), ("runs",), found.errors, ""),
    ]
    return [
        {
            "id": key,
            "title": title,
            "heads": [first, *(heads[column] for column in columns)],
            "rows": [
                (tally.name, [grouped(getattr(tally, column)) for column in columns])
                for tally in tallies
            ],
            "note": note,
        }
        for key, title, first, columns, tallies, note in tables
        if tallies
    ]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, in the SVG's units as it wants them: with a point, whatever the language.

    `layer` is 0 for the lower part of a stacked bar and 1 for the upper.
    """

    layer: int
    label: str
    x: str
    y: str
    width: str
    height: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A row of bars; `highest` is what the tallest of them stands for."""

    bars: tuple[Bar, ...]
    highest: int


def bar_chart(values: Sequence[tuple[int, ...]], labels: Sequence[str]) -> Chart:
    """Lay bars out, one for each label; several values of one are stacked."""
    highest = max((sum(stack) for stack in values), default=0)
    place = WIDTH / max(len(values), 1)
    bars: list[Bar] = []
    for index, (stack, label) in enumerate(zip(values, labels, strict=True)):
        below = 0
        for layer, value in enumerate(stack):
            below += value
            if value:
                x, width = index * place + place * _GAP / 2, place * (1 - _GAP)
                y, height = HEIGHT - HEIGHT * below / highest, HEIGHT * value / highest
                drawn = [f"{number:.2f}" for number in (x, y, width, height)]
                bars.append(Bar(layer, label, *drawn))
    return Chart(tuple(bars), highest)
