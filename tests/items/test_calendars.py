"""Times in files carry their offset, and the admin counts its reader's days."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connection
from django.test import Client, RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.admin.overview import gather
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.retention import Selection
from agent_sessions.times import aware, day_of, iso, stored
from tests.support.admin_pages import LIST, make, make_run, page, staff, url
from tests.support.exports import read_export

pytestmark = pytest.mark.django_db

TOKYO = "Asia/Tokyo"
OFFSET = re.compile(r"[+-]\d\d:\d\d$|Z$")


@pytest.fixture
def _naive() -> Iterator[None]:
    """Work as a project in Tokyo without USE_TZ."""
    with override_settings(USE_TZ=False, TIME_ZONE=TOKYO):
        yield
    sessions.reset()


def run(command: str, *args: str, **options: Any) -> str:
    out = io.StringIO()
    call_command(command, *args, stdout=out, stderr=io.StringIO(), **options)
    return out.getvalue()


def say(session_id: str = "chat", user: Any = None) -> AgentSession:
    session = DjangoSession(session_id, user=user).sync
    session.add_items([{"role": "user", "content": "hello"}])
    return AgentSession.objects.get(session_id=session_id)


def times_of(value: Any) -> Iterator[str]:
    """Find whatever looks like a time, anywhere in a JSON value."""
    if isinstance(value, dict):
        for each in value.values():
            yield from times_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from times_of(each)
    elif isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", value):
        yield value


@pytest.mark.usefixtures("_naive")
class TestWithoutTimeZones:
    AT = datetime(2026, 5, 1, 13, 37)  # noqa: DTZ001 - as such a project has it

    def make(self, user: Any = None) -> AgentSession:
        row = say(user=user)
        AgentSession.objects.update(
            created_at=self.AT, updated_at=self.AT, expires_at=self.AT
        )
        SessionItem.objects.update(created_at=self.AT)
        Branch.objects.update(created_at=self.AT)
        AgentRun.objects.create(
            session=row,
            branch=row.branch,
            run_id="r",
            status="completed",
            started_at=self.AT,
            finished_at=self.AT,
        )
        return row

    def test_an_export_comes_back_at_the_same_times(self, tmp_path: Path) -> None:
        self.make()
        file = tmp_path / "all.jsonl"
        run("export_agent_sessions", output=str(file))
        found = list(times_of(read_export(file.read_text())[0]))
        assert len(found) >= 6
        assert set(found) == {"2026-05-01T13:37:00+09:00"}
        AgentSession.objects.all().delete()
        run("import_agent_sessions", "export", "--from", str(file))
        row, item = AgentSession.objects.get(), SessionItem.objects.get()
        made, branch = AgentRun.objects.get(), Branch.objects.get()
        assert {row.created_at, row.updated_at, row.expires_at} == {self.AT}
        assert {item.created_at, branch.created_at} == {self.AT}
        assert {made.started_at, made.finished_at} == {self.AT}
        assert str(row.active_on) == "2026-05-01"

    def test_a_project_with_time_zones_takes_it_as_it_was(self, tmp_path: Path) -> None:
        self.make()
        file = tmp_path / "all.jsonl"
        run("export_agent_sessions", output=str(file))
        AgentSession.objects.all().delete()
        with override_settings(USE_TZ=True, TIME_ZONE="UTC"):
            run("import_agent_sessions", "export", "--from", str(file))
            row = AgentSession.objects.get()
            assert row.created_at == datetime(2026, 5, 1, 4, 37, tzinfo=UTC)

    @pytest.mark.parametrize(("options", "hour"), [({}, 13), ({"timezone": "UTC"}, 22)])
    def test_a_file_without_offsets_is_of_the_projects_zone(
        self, options: dict[str, Any], hour: int, tmp_path: Path
    ) -> None:
        self.make()
        file = tmp_path / "all.jsonl"
        run("export_agent_sessions", output=str(file))
        file.write_text(file.read_text().replace("+09:00", ""))
        AgentSession.objects.all().delete()
        run("import_agent_sessions", "export", "--from", str(file), **options)
        assert AgentSession.objects.get().created_at == self.AT.replace(hour=hour)

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("list_agent_sessions", {}),
            ("show_agent_session", {"session_id": "chat"}),
        ],
    )
    def test_what_commands_print_as_json(
        self, command: str, options: dict[str, Any]
    ) -> None:
        self.make()
        args = [options.pop("session_id")] if "session_id" in options else []
        found = list(times_of(json.loads(run(command, *args, json=True, **options))))
        assert found
        assert all(OFFSET.search(text) for text in found)

    def test_the_receipt_of_an_erasure(self) -> None:
        ann = get_user_model().objects.create_user("ann")
        self.make(ann)
        found = list(
            times_of(json.loads(run("erase_agent_user", "ann", interactive=False)))
        )
        assert len(found) == 2
        assert all(OFFSET.search(text) for text in found)

    def test_markdown_and_tables(self) -> None:
        self.make()
        assert "2026-05-01T13:37:00+09:00" in run(
            "export_agent_sessions", format="markdown"
        )
        assert "2026-05-01 04:37:00 UTC" in run("show_agent_session", "chat")
        assert "2026-05-01 13:37:00+09:00" in run("list_agent_sessions")

    def test_the_export_of_the_admin(self) -> None:
        row, client = self.make(), staff("view", "read")
        for form in ("json", "markdown"):
            text = b"".join(client.post(url("export", row, form))).decode()
            assert "2026-05-01T13:37:00+09:00" in text

    def test_the_http_view(self) -> None:
        from agent_sessions.views import SessionListView

        user = get_user_model().objects.create_user("ann")
        self.make(user)
        request = RequestFactory().get("/")
        request.user = user
        response: Any = SessionListView.as_view()(request)
        found = list(times_of(json.loads(response.content)))
        assert found
        assert all(OFFSET.search(text) for text in found)

    def test_branches_and_turns(self) -> None:
        self.make()
        session = DjangoSession("chat").sync
        found = [*times_of(session.list_branches())]
        found += times_of(session.get_conversation_turns())
        assert found == ["2026-05-01 13:37:00+09:00"] * 2

    def test_filters_and_figures_count_local_days(self) -> None:
        row = say()
        make_run(row)
        found = gather(7)
        assert (found.days[-1][1].sessions, found.days[-1][1].runs) == (1, 1)
        client = staff("view")
        assert "chat" in page(client, link(client, "Today"))


@pytest.mark.parametrize("zone", ["UTC", TOKYO, "Pacific/Honolulu", "America/New_York"])
@pytest.mark.parametrize("use_tz", [True, False])
def test_times_come_back_as_they_were_stored(zone: str, use_tz: bool) -> None:
    moment = datetime(2026, 7, 31, 23, 59, 59, 123456, tzinfo=UTC)
    with override_settings(USE_TZ=use_tz, TIME_ZONE=zone):
        kept = stored(moment)
        assert timezone.is_aware(kept) is use_tz
        assert aware(kept) == moment
        assert datetime.fromisoformat(iso(kept)) == moment
        assert day_of(stored(timezone.now().replace(tzinfo=UTC))) is not None


def link(client: Client, wanted: str) -> str:
    html = page(client, reverse(LIST))
    links = re.findall(
        r'<a href="(\?[^"]*updated_at__gte[^"]*)"[^>]*>\s*([^<]+)<', html
    )
    [found] = [link for link, text in links if text.strip() == wanted]
    return f"{reverse(LIST)}{found.replace('&amp;', '&')}"


def used(name: str, when: datetime) -> None:
    """Make a session and a run that were last active then, as the store writes it."""
    row = make(name, updated_at=when, active_on=day_of(when))
    make_run(row, run_id=name, started_at=when)


# Where the reader's day and UTC's differ by most.
ZONES = ["Pacific/Honolulu", "Pacific/Kiritimati", "UTC"]


@pytest.mark.parametrize("zone", ZONES)
class TestDaysOfTheReader:
    @pytest.fixture(autouse=True)
    def _zone(self, zone: str) -> Iterator[None]:
        with override_settings(TIME_ZONE=zone):
            yield

    def midnight(self, zone: str) -> datetime:
        now = datetime.now(ZoneInfo(zone))
        return now.replace(hour=0, minute=0, second=0, microsecond=0)

    def test_what_is_used_now_is_of_today(self, zone: str) -> None:
        make_run(make("now"))
        client = staff("view")
        for wanted in ("Today", "Past 7 days", "This month", "This year"):
            assert "now" in page(client, link(client, wanted)), wanted
        found = gather(7)
        assert (found.total.sessions, found.total.runs) == (1, 1)
        day, tally = found.days[-1]
        assert (day, tally.sessions, tally.runs) == (timezone.localdate(), 1, 1)

    def test_today_begins_at_the_readers_midnight(self, zone: str) -> None:
        start = self.midnight(zone)
        used("first-moment", start)
        used("last-moment", start - timedelta(microseconds=1))
        client = staff("view")
        html = page(client, link(client, "Today"))
        assert "first-moment" in html
        assert "last-moment" not in html
        days = [(t.sessions, t.runs) for _, t in gather(7).days]
        assert days[-2:] == [(1, 1), (1, 1)]

    def test_the_overview_counts_sessions_and_runs_by_the_same_days(
        self, zone: str
    ) -> None:
        start = self.midnight(zone)
        for back in range(40):
            for hour in (0, 3, 11, 23):
                used(f"{back}-{hour}", start - timedelta(days=back, hours=-hour))
        for length in (7, 14, 30):
            found = gather(length)
            assert [t.sessions for _, t in found.days] == [4] * length
            assert [t.runs for _, t in found.days] == [4] * length
            assert found.total.sessions == found.total.runs == 4 * length

    def test_retention_goes_by_the_time_itself(self, zone: str) -> None:
        now = timezone.now()
        used("older", now - timedelta(days=2, minutes=1))
        used("younger", now - timedelta(days=2, minutes=-1))
        rows = Selection(older_than=timedelta(days=2)).rows()
        assert [row.session_id for row in rows] == ["older"]


def test_another_readers_zone_has_other_days() -> None:
    # A project may activate a zone for each reader.
    for zone in ZONES:
        make(zone)
        with timezone.override(zone):
            found = gather(7)
            assert found.days[-1][0] == timezone.localdate()
            assert found.days[-1][1].sessions == len(ZONES[: ZONES.index(zone) + 1])


def test_a_filter_by_day_is_served_by_an_index() -> None:
    client = staff("view")
    address = link(client, "Today")
    with CaptureQueriesContext(
        connection,
    ) as queries:
        page(client, address)
    [listed] = [
        q["sql"]
        for q in queries.captured_queries
        if "ORDER BY" in q["sql"] and "agent_sessions_agentsession" in q["sql"]
    ]
    assert "active_on" in listed.partition("WHERE")[2].partition("ORDER")[0]
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN QUERY PLAN {listed}")
            plan = " ".join(str(row) for row in cursor.fetchall())
        assert "agent_sessions_by_day" in plan


@pytest.mark.parametrize("act", ["append", "pop", "clear", "touch"])
def test_whatever_counts_as_activity_moves_the_day_along(act: str) -> None:
    row = make("chat")
    old = timezone.now() - timedelta(days=40)
    AgentSession.objects.update(updated_at=old, active_on=day_of(old))
    backend, key = sessions["default"], SessionKey("chat")
    if act == "touch":
        backend.directory.touch(key, count=None, title="")
    elif act == "append":
        backend.append(key, [{"role": "user", "content": "more"}])
    else:
        getattr(backend, act)(key)
    row.refresh_from_db()
    assert row.updated_at > old + timedelta(days=39)
    assert row.active_on == day_of(row.updated_at)
