"""What the admin's pages read doesn't grow with the tables."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client
from django.urls import reverse

from agent_sessions.admin import CappedPaginator, reading, sessions
from agent_sessions.approvals import find_states
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from benchmarks.admin import pages
from benchmarks.costs import watched
from benchmarks.crowd import Crowd, fill
from tests.settings import DATABASE_KIND
from tests.support.admin_pages import LIST, make, messages, page, staff

pytestmark = [pytest.mark.django_db]

FEW = Crowd(sessions=1_000, users=100, heavy=20, items=400, runs=100)
MANY = Crowd(sessions=4_000, users=400, heavy=20, items=1_600, runs=400)
# These show all of a range of days, and how much one person has.
RANGES = ("overview", "past ", " 30 days", "delete the heavy user")


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CappedPaginator, "limit", 100)
    monkeypatch.setattr(sessions, "FOUND", 30)
    monkeypatch.setattr(reading, "RUNS", 20)
    monkeypatch.setattr(reading, "NEAR", 10)


def costs(crowd: Crowd) -> dict[str, int]:
    """Return what each page reads: rows, or instructions of SQLite in hundreds."""
    get_user_model().objects.all().delete()
    for model in (SessionItem, AgentRun, Branch, AgentSession):
        model._base_manager.all().delete()
    fill(crowd)
    client = Client()
    root: Any = get_user_model().objects.create(
        pk=10**6, username="root", is_staff=True, is_superuser=True
    )
    client.force_login(root)
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
            # As if the tables were longer: short ones are read whole.
            cursor.execute("SET LOCAL random_page_cost = 0.1")
    found = {}
    for name, address in pages(crowd).items():
        if not any(words in name for words in RANGES):
            with watched() as read:
                response = client.get(re.sub(r"\?p=\d+", "?p=2", address))
            assert response.status_code == 200, name
            found[name.partition(", page")[0]] = read.rows
    return found


@pytest.mark.skipif(
    DATABASE_KIND == "mariadb",
    reason="MariaDB sorts thousands of rows itself where it thinks that cheaper.",
)
def test_no_page_reads_a_table_that_grows() -> None:
    few, many = costs(FEW), costs(MANY)
    assert few.keys() == many.keys()
    assert len(few) > 25
    # An index is a little deeper; more sessions wait.
    grown = {
        name: (few[name], rows)
        for name, rows in many.items()
        if rows > 1.5 * few[name] + 100
    }
    assert grown == {}, grown


@pytest.mark.skipif(DATABASE_KIND == "mariadb", reason="It counts as above.")
def test_a_list_reads_the_runs_of_its_own_sessions_alone() -> None:
    read = {}
    for count in (100, 2_000):
        fill(Crowd(sessions=count, users=20, heavy=20, items=20, runs=20))
        AgentSession.objects.update(state="waiting")
        AgentRun.objects.update(status="waiting", state="sealed")
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("ANALYZE")
        rows = list(AgentSession.objects.order_by("pk")[1:51])
        with watched() as costs:
            find_states(rows)
        read[count] = costs.rows
        for model in (SessionItem, AgentRun, Branch, AgentSession):
            model._base_manager.all().delete()
        get_user_model().objects.all().delete()
    assert read[2_000] < 2 * read[100] + 100, read


# Its index serves the branch alone there, from the newest row back.
WALKS_BACK = pytest.mark.xfail(
    DATABASE_KIND == "mariadb",
    reason="MariaDB walks back from the branch's end",
    strict=True,
)


@pytest.mark.parametrize("bound", [pytest.param("before", marks=WALKS_BACK), "after"])
def test_a_page_in_the_middle_reads_no_more_than_at_the_ends(bound: str) -> None:
    row = make("long", *[{"role": "user", "content": "Hi"}] * 5_000)
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE agent_sessions_sessionitem")
    history = reading.History(row)
    for position in (20, 2_500, 4_980):
        with watched() as read:
            page = history.page(**{bound: position}, limit=10)
        assert len(page.items) == 10
        assert page.has_earlier
        assert page.has_later
        assert read.rows < 60, (position, read)
        with watched() as read:
            history.calls({"call"}, position)
        # Keys of calls have no index; it looks no further than NEAR.
        assert read.rows < reading.NEAR + 60, (position, read)


def test_very_many_waiting_runs_are_not_counted() -> None:
    row = make()
    AgentRun.objects.bulk_create(
        AgentRun(session=row, run_id=f"r{number}", status="waiting")
        for number in range(100)
    )
    client = staff("view", runs=True)
    runs = reverse("admin:agent_sessions_agentrun_changelist")
    overview = reverse("admin:agent_sessions_agentsession_overview")
    for shown in ("100 runs wait", "100+ runs wait"):
        for address in (runs, overview):
            assert shown in page(client, address)
        AgentRun.objects.create(session=row, run_id=shown, status="waiting")


@pytest.mark.parametrize("action", ["clear_history", "delete_selected"])
def test_an_action_takes_no_more_than_a_list_counts(action: str) -> None:
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"s{number}") for number in range(101)
    )
    first = AgentSession.objects.latest("pk")
    client = staff("view", "clear", "delete")
    data = {"action": action, "_selected_action": first.pk, "select_across": "1"}
    data |= {"post": "yes", "count": "101"}
    with watched() as read:
        response = client.post(reverse(LIST), data, follow=True)
    assert messages(response) == [
        "At most 100 sessions can be chosen for this. Filter the list."
    ]
    assert AgentSession.objects.count() == 101
    first.delete()
    data = {**data, "count": "100", "_selected_action": first.pk or 0}
    with watched() as read:
        response = client.post(reverse(LIST), data, follow=True)
    assert messages(response)[0].startswith(("Cleared 100 ", "Deleted 100 "))
    # Two transactions of 50 sessions, not one of each.
    assert read.queries < 130


def test_words_of_titles_are_looked_for_among_the_newest() -> None:
    for number in range(103):
        AgentSession.objects.create(session_id=f"s{number}", title=f"Order {number}")
    client = staff("view", "read")
    assert ">Order 102</a>" in page(client, f"{reverse(LIST)}?q=102+order")
    assert ">Order 3</a>" in page(client, f"{reverse(LIST)}?q=order+3")
    # The three that were active before them.
    assert "0 agent sessions" in page(client, f"{reverse(LIST)}?q=%22Order+2%22")


@pytest.mark.parametrize("sort", ["o=6", "o=-6", "o=7", "o=-7", "o=3"])
def test_lists_are_sorted_as_an_index_is(sort: str) -> None:
    for day in (3, 1, 2):
        make(f"s{day}", active_on=f"2026-01-0{day}", item_count=9 - day)
    html = page(staff("view"), f"{reverse(LIST)}?{sort}")
    found = sorted((1, 2, 3), key=lambda day: html.index(f">s{day}</a>"))
    assert found == ([1, 2, 3] if sort == "o=6" else [3, 2, 1])
