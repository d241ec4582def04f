"""The overview of Django's admin: figures, charts, and how they are found."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agent_sessions.admin.overview import HEIGHT, WIDTH, bar_chart, gather
from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import (
    LIST,
    XSS,
    Markup,
    assert_safe,
    make_run,
    page,
    staff,
)

pytestmark = pytest.mark.django_db

OVERVIEW = "admin:agent_sessions_agentsession_overview"


def row(name: str = "chat", **fields: Any) -> AgentSession:
    return AgentSession.objects.create(session_id=name, **fields)


def ago(days: float) -> datetime:
    return timezone.now() - timedelta(days=days)


class TestFigures:
    def test_runs_by_day_and_agent(self) -> None:
        one = row()
        make_run(one, run_id="a", agent_name="A", input_tokens=10, output_tokens=1)
        make_run(one, run_id="b", agent_name="B", input_tokens=20, status="failed")
        make_run(one, run_id="c", agent_name="B", status="waiting")
        make_run(one, run_id="d", started_at=ago(2), input_tokens=5)
        make_run(one, run_id="e", started_at=ago(9), input_tokens=500)
        found = gather(7)
        assert len(found.days) == 7
        day, today = found.days[-1]
        assert day == timezone.localdate()
        assert (today.runs, today.input_tokens, today.output_tokens) == (3, 30, 1)
        assert (today.errors, today.waiting) == (1, 1)
        assert found.days[-3][1].input_tokens == 5
        assert (found.total.runs, found.total.tokens) == (4, 36)
        agents = [(tally.name, tally.runs, tally.tokens) for tally in found.agents]
        assert agents == [("B", 2, 20), ("A", 1, 11), ("", 1, 5)]
        assert found.waiting_now == 1

    def test_sessions_by_day_store_and_user(self) -> None:
        alice = get_user_model().objects.create_user("alice")
        bob = get_user_model().objects.create_user("bob")
        today = timezone.now().date()
        row("a", user=alice, input_tokens=10, output_tokens=5)
        row("b", user=alice, input_tokens=1, backend="other")
        row("c", user=bob, input_tokens=100, active_on=today - timedelta(days=1))
        row("d", input_tokens=7)
        row("e", user=bob, input_tokens=999, active_on=today - timedelta(days=40))
        found = gather(7)
        assert found.total.sessions == 4
        assert sum(tally.sessions for _day, tally in found.days) == 4
        stores = [
            (tally.name, tally.sessions, tally.tokens) for tally in found.backends
        ]
        assert stores == [("default", 3, 122), ("other", 1, 1)]
        users = [(tally.name, tally.sessions, tally.tokens) for tally in found.users]
        assert users == [("bob", 1, 100), ("alice", 2, 16)]

    def test_errors_by_code(self) -> None:
        one = row()
        for n, code in enumerate(("x", "y", "y", "")):
            make_run(one, run_id=f"r{n}", status="failed", error_code=code)
        make_run(one, run_id="old", status="failed", error_code="z", started_at=ago(9))
        errors = [(tally.name, tally.runs) for tally in gather(7).errors]
        assert errors == [("y", 2), ("", 1), ("x", 1)]

    @pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
    def test_a_day_is_one_of_the_current_time_zone(self, zone: str) -> None:
        one = row()
        with timezone.override(zone):
            start = timezone.localtime().replace(hour=0, minute=0, second=0)
            start = start.replace(microsecond=0)
            make_run(one, run_id="first", started_at=start)
            make_run(one, run_id="before", started_at=start - timedelta(microseconds=1))
            found = gather(7)
        assert [tally.runs for _day, tally in found.days[-2:]] == [1, 1]

    @override_settings(USE_TZ=False)
    def test_without_time_zones(self) -> None:
        AgentRun.objects.create(session=row(), run_id="r", started_at=datetime.now())  # noqa: DTZ005
        assert gather(7).total.runs == 1

    def test_names_of_tables_are_ten_at_most(self) -> None:
        one = row()
        for n in range(12):
            make_run(one, run_id=f"r{n}", agent_name=f"a{n}", input_tokens=n)
        found = gather(7)
        assert [tally.name for tally in found.agents][:2] == ["a11", "a10"]
        assert len(found.agents) == 10


class TestPage:
    def test_charts_have_tables_beside_them(self) -> None:
        alice = get_user_model().objects.create_user("alice")
        one = row(user=alice, input_tokens=12345)
        make_run(one, agent_name="Billing", input_tokens=12345, output_tokens=7)
        make_run(one, run_id="w", status="waiting")
        make_run(one, run_id="f", status="failed", error_code="model_error")
        html = page(staff("view"), reverse(OVERVIEW))
        assert html.count("<svg class=") == 5
        assert html.count('role="img"') == 5
        assert html.count("as-bar-1") == 1
        for text in (
            "12,352 in all, 12,352 on the busiest day",
            "1 run waits for approval.",
            "By day",
            "By agent",
            "By store",
            "Top users by tokens",
            "Errors by code",
            "Billing",
            "alice",
            "model_error",
            "12,345 + 7",
        ):
            assert text in html
        assert html.count("<tr>") >= 30
        markup = Markup(html)
        assert markup.inline == []
        assert len(markup.ids) == len(set(markup.ids))

    def test_of_nothing(self) -> None:
        html = page(staff("view"), reverse(OVERVIEW))
        assert html.count("<svg class=") == 5
        assert "as-bar-0" not in html
        assert "By agent" not in html
        assert "waits for approval" not in html

    @pytest.mark.parametrize(
        ("query", "days"), [("", 30), ("?days=7", 7), ("?days=1000000", 30)]
    )
    def test_ranges(self, query: str, days: int) -> None:
        html = page(staff("view"), reverse(OVERVIEW) + query)
        rows = re.search(r'id="as-days".*?</table>', html, re.DOTALL)
        assert rows
        assert rows[0].count('<th scope="row">') == days + 1
        assert f'<a href="?days={days}" aria-current="page">' in html

    def test_numbers_of_the_drawing_are_those_of_svg_in_any_language(self) -> None:
        make_run(row(), input_tokens=3, output_tokens=4)
        client = staff("view")
        html = client.get(reverse(OVERVIEW), headers={"accept-language": "de"})
        drawn = re.findall(r'<rect [^>]*?y="([^"]*)"', html.content.decode())
        assert drawn
        assert all(re.fullmatch(r"[\d.]+", number) for number in drawn)

    def test_the_list_leads_to_it_and_rights_hold(self) -> None:
        assert reverse(OVERVIEW) in page(staff("view"), reverse(LIST))
        for number, rights in enumerate(((), ("read", "clear", "delete"))):
            client = staff(*rights, name=f"other{number}")
            assert client.get(reverse(OVERVIEW)).status_code == 403
        assert Client().get(reverse(OVERVIEW)).status_code == 302

    def test_links_to_runs_are_for_those_who_may_see_them(self) -> None:
        make_run(row(), status="waiting")
        link = reverse("admin:agent_sessions_agentrun_changelist")
        assert f"{link}?status" not in page(staff("view"), reverse(OVERVIEW))
        client = staff("view", runs=True, name="other")
        assert f'"{link}?status__exact=waiting"' in page(client, reverse(OVERVIEW))

    def test_hostile_names_stay_text(self) -> None:
        user = get_user_model().objects.create_user(XSS)
        one = row(XSS, user=user, backend=XSS[:64], input_tokens=1)
        make_run(one, agent_name=XSS, status="failed", error_code=XSS[:64])
        html = page(staff("view"), reverse(OVERVIEW))
        assert_safe(html)
        assert html.count("&lt;script&gt;alert(1)") == 4


class TestCost:
    def test_queries_are_the_same_for_few_and_many(self) -> None:
        one = row()
        make_run(one)
        with CaptureQueriesContext(connection) as few:
            gather(30)
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(200)
        )
        AgentRun.objects.bulk_create(
            AgentRun(session=one, run_id=f"r{n}", agent_name=f"a{n}")
            for n in range(500)
        )
        with CaptureQueriesContext(connection) as many:
            gather(30)
        assert len(few) == len(many) == 5

    @pytest.mark.one_database
    def test_days_are_found_by_index(self) -> None:
        """SQLite's plan is the same whatever the tables hold."""
        with CaptureQueriesContext(connection) as queries:
            gather(7)
        for query in queries:
            with connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN QUERY PLAN {query['sql']}")
                plan = "\n".join(str(step[-1]) for step in cursor.fetchall())
            assert "SCAN agent_sessions" not in plan, plan
            assert "INDEX agent_sessions_" in plan, plan


class TestBars:
    def test_fill_the_drawing(self) -> None:
        chart = bar_chart([(1,), (4,), (0,)], ["a", "b", "c"])
        assert chart.highest == 4
        assert [bar.label for bar in chart.bars] == ["a", "b"]
        assert [float(bar.height) for bar in chart.bars] == [HEIGHT / 4, HEIGHT]
        assert [float(bar.y) for bar in chart.bars] == [HEIGHT * 3 / 4, 0]
        assert float(chart.bars[-1].x) + float(chart.bars[-1].width) < WIDTH

    def test_stack(self) -> None:
        lower, upper = bar_chart([(1, 3)], ["a"]).bars
        assert (lower.layer, upper.layer) == (0, 1)
        assert float(upper.y) == 0
        assert float(upper.y) + float(upper.height) == float(lower.y)

    def test_of_nothing(self) -> None:
        assert bar_chart([], []).bars == ()
        assert bar_chart([(0, 0)], ["a"]).highest == 0


def test_midnight_exists_where_clocks_change() -> None:
    # In Beirut, the clocks of 2026-03-29 go from 00:00 to 01:00.
    from datetime import date

    from agent_sessions.admin.overview import _midnight

    with timezone.override("Asia/Beirut"):
        start, end = _midnight(date(2026, 3, 29)), _midnight(date(2026, 3, 30))
    assert (end - start).total_seconds() >= 0
    assert end.astimezone(UTC) == datetime(2026, 3, 29, 21, tzinfo=UTC)
