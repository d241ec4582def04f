"""The list of conversations in Django's admin."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin import AdminSite, site
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse
from django.utils import timezone

from agent_sessions.admin import AgentSessionAdmin, CappedPaginator
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import (
    LIST,
    Markup,
    make,
    make_run,
    page,
    staff,
)
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db


@pytest.fixture
def reader() -> Client:
    return staff("view", "read")


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


class TestList:
    def test_columns(self, reader: Client, alice: Any) -> None:
        make("chat", user=alice, input_tokens=12345, output_tokens=678)
        html = page(reader, reverse(LIST))
        assert "First line of chat" in html
        assert "alice" in html
        assert "12,345 / 678" in html
        for header in (
            "Title",
            "User",
            "Store",
            "Items",
            "State",
            "Last activity",
            "Created",
        ):
            assert f">{header}<" in html

    @pytest.mark.parametrize(
        ("state", "words"),
        [("idle", "idle"), ("running", "running"), ("waiting", "waiting for approval")],
    )
    def test_state_is_told_in_words(
        self, reader: Client, state: str, words: str
    ) -> None:
        row = make(state=state)
        if state == "waiting":
            wait(row)
        html = page(reader, reverse(LIST))
        assert f'<span class="as-state as-state-{state}">{words}</span>' in html

    def test_sessions_without_title_or_tokens(self, reader: Client) -> None:
        AgentSession.objects.create(session_id="new")
        make("tool", {"type": "reasoning", "id": "r", "summary": []})
        html = page(reader, reverse(LIST))
        assert '<span class="as-quiet">(empty)</span>' in html
        assert '<span class="as-quiet">tool</span>' in html
        assert 'class="field-tokens">-<' in html

    def test_order_is_by_day_and_serves_the_index(self, reader: Client) -> None:
        today = timezone.now().date()
        for days, name in enumerate(("today", "yesterday", "before")):
            make(name, active_on=today - timedelta(days=days))
        html = page(reader, reverse(LIST))
        places = [
            html.index(f"First line of {n}") for n in ("today", "yesterday", "before")
        ]
        assert places == sorted(places)

    @pytest.mark.parametrize(
        ("search", "found"),
        [
            ("cha", {"chat"}),
            ("essage", set()),
            ("alice", {"hers"}),
            ("ali", set()),
            ("line of chat", {"chat"}),
            ("answer", set()),
        ],
    )
    def test_search(
        self, reader: Client, alice: Any, search: str, found: set[str]
    ) -> None:
        make("chat")
        make("hers", user=alice)
        html = page(reader, f"{reverse(LIST)}?q={search}")
        assert {n for n in ("chat", "hers") if f"First line of {n}" in html} == found
        assert "Message texts are not searched" in html

    def test_search_finds_letters_composed_or_not(
        self, reader: Client, alice: Any
    ) -> None:
        make("hers", user=alice)
        for stored, search in (
            ("Caf\u00e9", "Cafe\u0301"),
            ("Cafe\u0301", "Caf\u00e9"),
        ):
            AgentSession.objects.update(title=stored)
            html = page(reader, f"{reverse(LIST)}?q={search}")
            assert stored in html

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("state__exact=waiting", {"waits"}),
            ("user__isempty=1", {"chat", "waits"}),
            ("backend=other", {"waits"}),
        ],
    )
    def test_filters(
        self, reader: Client, alice: Any, query: str, found: set[str]
    ) -> None:
        names = {
            "default": {"BACKEND": DATABASE_BACKEND},
            "other": {"BACKEND": DATABASE_BACKEND},
        }
        with override_settings(AGENT_SESSIONS=names):
            make("chat")
            make("hers", user=alice)
            wait(make("waits", backend="other"))
            html = page(reader, f"{reverse(LIST)}?{query}")
        assert {
            n for n in ("chat", "hers", "waits") if f"First line of {n}" in html
        } == found
        assert "By store" in html

    def test_states_are_found_as_they_are_shown(self, reader: Client) -> None:
        make_run(make("runs", state="running"), status="running")
        wait(make("waits"))
        for name in ("late", "gone on"):
            wait(make(name), run_id=name)
        late = AgentRun.objects.filter(run_id="late")
        late.update(expires_at=timezone.now() - timedelta(days=1))
        make_run(AgentSession.objects.get(session_id="gone on"), run_id="next")
        make("idle")
        names = {"runs", "waits", "late", "gone on", "idle"}
        for state, found in (
            ("running", {"runs"}),
            ("waiting", {"waits"}),
            # They are found among all others only.
            ("idle", set()),
            ("completed", set()),
        ):
            html = page(reader, f"{reverse(LIST)}?state__exact={state}")
            assert {n for n in names if f"First line of {n}<" in html} == found
            shown = set(re.findall(r"as-state as-state-(\w+)", html))
            assert shown <= {state}

    def test_one_store_is_no_choice(self, reader: Client) -> None:
        make()
        assert "By store" not in page(reader, reverse(LIST))

    def test_queries_are_the_same_for_one_session_and_a_thousand(
        self, reader: Client, alice: Any
    ) -> None:
        make("one", user=alice)
        reader.get(reverse(LIST))
        with CaptureQueriesContext(
            connection,
        ) as few:
            reader.get(reverse(LIST))
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}", user=alice, title=f"t{n}")
            for n in range(1_000)
        )
        with CaptureQueriesContext(connection) as many:
            reader.get(reverse(LIST))
        assert len(few) == len(many)
        table = [q["sql"] for q in many if "agent_sessions_agentsession" in q["sql"]]
        assert len(table) == 2
        (count,) = (sql for sql in table if "COUNT(" in sql.upper())
        assert "LIMIT 10001" in count

    def test_counting_ends_at_its_limit(self, reader: Client, monkeypatch: Any) -> None:
        monkeypatch.setattr(CappedPaginator, "limit", 60)
        rows = [AgentSession(session_id=f"s{n}", title=f"t{n}") for n in range(61)]
        AgentSession.objects.bulk_create(rows[:60])
        assert "There are more" not in page(reader, reverse(LIST))
        AgentSession.objects.bulk_create(rows[60:])
        html = page(reader, reverse(LIST))
        assert "There are more; search or filter" in html
        assert "60 agent sessions" in html
        assert "?p=2" in html
        assert "?p=3" not in html


backoffice = AdminSite(name="backoffice")
backoffice.register(AgentSession, AgentSessionAdmin)
urlpatterns = [
    path("admin/", site.urls),
    path("backoffice/", backoffice.urls),
]


@override_settings(ROOT_URLCONF="tests.admin.test_admin")
def test_another_admin_site_stays_on_itself(alice: Any) -> None:
    row = make(user=alice)
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root", password="x"))
    address = reverse("backoffice:agent_sessions_agentsession_change", args=(row.pk,))
    for html in (
        page(client, address),
        page(client, f"{address.removesuffix('change/')}clear/"),
        page(client, reverse("backoffice:agent_sessions_agentsession_changelist")),
    ):
        assert not [link for link in Markup(html).links if link.startswith("/admin/")]
    done = client.post(
        f"{address.removesuffix('change/')}clear/", {"post": "yes", "count": "1"}
    )
    assert done["Location"] == address
