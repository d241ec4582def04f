"""What happened lately, in numbers: a few queries over a bounded range of days."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db.models import (
    Case,
    Count,
    F,
    IntegerField,
    QuerySet,
    Sum,
    Value,
    When,
)
from django.utils import timezone

from agent_sessions.admin.databases import database
from agent_sessions.approvals import waiting
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.times import day_of

_DAY = timedelta(days=1)
# Rows of each table of names.
TOP = 10
# The index begins with the status: named all, a range of days is read from it.
STATUSES = AgentRun.Status.values
_FAILED, _WAITING = AgentRun.Status.FAILED, AgentRun.Status.WAITING


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
    """The figures of the overview page; days are in order, names by their tokens."""

    days: list[tuple[date, Tally]]
    total: Tally
    agents: list[Tally] = field(default_factory=list)
    backends: list[Tally] = field(default_factory=list)
    users: list[Tally] = field(default_factory=list)
    errors: list[tuple[str, int]] = field(default_factory=list)
    waiting_now: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """The rows that are counted: those that the reader may view."""

    sessions: QuerySet[Any] = field(
        default_factory=lambda: AgentSession.objects.using(database())
    )
    runs: QuerySet[Any] = field(
        default_factory=lambda: AgentRun.objects.using(database())
    )


def gather(length: int, source: Source | None = None) -> Statistics:
    """Count what happened in the last `length` days, today among them.

    The number of queries is always the same, and each reads only the range's rows.
    """
    source = source or Source()
    today = timezone.localdate() if settings.USE_TZ else date.today()  # noqa: DTZ011
    days = [today - timedelta(days=back) for back in range(length - 1, -1, -1)]
    tallies = {day: Tally(day.isoformat()) for day in days}
    agents: dict[str, Tally] = {}
    total = Tally("")
    for number, status, agent, *counts in _runs_by_day(source, days):
        tallies[days[number]].add(status, *counts)
        agents.setdefault(agent, Tally(agent)).add(status, *counts)
        total.add(status, *counts)
    backends = _count_sessions(source, days, tallies)
    total.sessions = sum(tally.sessions for tally in backends)
    return Statistics(
        days=list(tallies.items()),
        total=total,
        agents=_top(agents.values()),
        backends=_top(backends),
        users=_top_users(source, days),
        errors=_top_errors(source, days),
        waiting_now=waiting(source.runs).count(),
    )


def _runs_by_day(source: Source, days: list[date]) -> Iterable[tuple[Any, ...]]:
    """Sum up runs by day, status and agent.

    A day is a range of times: cutting times to days is slow, and on SQLite a call
    back into Python for every row.
    """
    parts = [
        _runs(source, day, day)
        .annotate(number=Value(number))
        .values("number", "status", "agent_name")
        .annotate(
            runs=Count("pk"), given=Sum("input_tokens"), made=Sum("output_tokens")
        )
        .values_list("number", "status", "agent_name", "runs", "given", "made")
        for number, day in enumerate(days)
    ]
    first, *rest = parts
    rows: Iterable[tuple[Any, ...]] = first.union(*rest, all=True)
    return rows


def _count_sessions(
    source: Source, days: list[date], tallies: dict[date, Tally]
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
    rows = (
        _sessions(source, days)
        .annotate(number=number)
        .values("number", "backend")
        .annotate(
            count=Count("pk"), given=Sum("input_tokens"), made=Sum("output_tokens")
        )
        .values_list("number", "backend", "count", "given", "made")
    )
    for index, backend, count, given, made in rows:
        tallies[days[index]].sessions += count
        tally = backends.setdefault(backend, Tally(backend))
        tally.sessions += count
        tally.input_tokens += given
        tally.output_tokens += made
    return list(backends.values())


def _top_users(source: Source, days: list[date]) -> list[Tally]:
    name = f"user__{get_user_model().USERNAME_FIELD}"
    rows = (
        _sessions(source, days)
        .exclude(user=None)
        .values("user_id", name)
        .annotate(
            count=Count("pk"),
            given=Sum("input_tokens"),
            made=Sum("output_tokens"),
            tokens=Sum(F("input_tokens") + F("output_tokens")),
        )
        .order_by("-tokens", "user_id")
        .values_list(name, "count", "given", "made")[:TOP]
    )
    return [
        Tally(str(user), sessions=count, input_tokens=given, output_tokens=made)
        for user, count, given, made in rows
    ]


def _top_errors(source: Source, days: list[date]) -> list[tuple[str, int]]:
    rows = _runs(source, days[0], days[-1]).filter(status=_FAILED)
    codes = rows.values_list("error_code").annotate(count=Count("pk"))
    return list(codes.order_by("-count", "error_code")[:TOP])


def _runs(source: Source, first: date, last: date) -> QuerySet[Any]:
    """Return the runs that began from one day's first moment to another's last."""
    return source.runs.filter(
        status__in=STATUSES,
        started_at__gte=_midnight(first),
        started_at__lt=_midnight(last + _DAY),
    ).order_by()


def _sessions(source: Source, days: list[date]) -> QuerySet[Any]:
    """Return the sessions that were last active in a range of the reader's days.

    The index has the day that day_of() gives: it narrows, the time decides.
    """
    since, until = _midnight(days[0]), _midnight(days[-1] + _DAY)
    return source.sessions.filter(
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
