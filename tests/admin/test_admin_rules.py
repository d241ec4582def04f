"""Rules of a project's own admin about single sessions, at every door."""

from __future__ import annotations

from functools import wraps
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.db import connection
from django.http import HttpRequest
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from agent_sessions.admin import AgentSessionAdmin
from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import RIGHTS, page, staff
from tests.support.admin_sites import HIDING, SITES, World, at, text

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.urls("tests.support.admin_sites"),
]


@pytest.fixture
def world() -> World:
    return World()


# The pages of one session, and what one sends there.
PAGES = (
    ("agentsession_change", (), 200),
    ("agentsession_item", (1,), 200),
    ("agentsession_export", ("json",), 200),
    ("agentsession_export", ("markdown",), 200),
    ("agentsession_clear", (), 200),
    ("agentsession_delete", (), 200),
    ("agentsession_history", (), 200),
)


@pytest.mark.parametrize("site", HIDING)
class TestHidden:
    """What may not be viewed does not exist."""

    @pytest.mark.parametrize(("name", "args", "status"), PAGES)
    def test_pages(
        self, world: World, site: str, name: str, args: Any, status: int
    ) -> None:
        assert world.get(site, name, world.ours.pk, *args).status_code == status
        response = world.get(site, name, world.theirs.pk, *args)
        missing = world.get(site, name, 10**9, *args)
        assert response.status_code == missing.status_code
        assert response.status_code in {302, 404}
        assert "theirs" not in text(response)
        posted = world.client.post(
            at(site, name, world.theirs.pk, *args), {"post": "yes", "count": "1"}
        )
        assert posted.status_code != 200
        assert AgentSession.objects.get(pk=world.theirs.pk).item_count == 2
        assert not LogEntry.objects.filter(object_repr="theirs-id").exists()

    def test_the_list_and_its_count(self, world: World, site: str) -> None:
        html = text(world.get(site, "agentsession_changelist"))
        assert "First line of ours-id" in html
        assert "1 agent session" in html
        assert "theirs" not in html
        for query in ({"q": "theirs"}, {"session_id": "theirs-id"}):
            html = text(world.get(site, "agentsession_changelist", **query))
            assert "0 agent sessions" in html

    def test_suggestions(self, world: World, site: str) -> None:
        query = {
            "app_label": "agent_sessions",
            "model_name": "agentrun",
            "field_name": "session",
        }
        found = world.client.get(
            f"{reverse(f'{site}:autocomplete')}?{urlencode(query)}"
        ).json()
        assert [one["text"] for one in found["results"]] == ["ours-id"]

    @pytest.mark.parametrize("action", ["clear_history", "delete_selected"])
    def test_actions_that_ask_first(self, world: World, site: str, action: str) -> None:
        for across in ("0", "1"):
            html = text(world.act(site, action, select_across=across))
            assert "ours-id" in html
            assert "theirs" not in html
            assert f'value="{world.theirs.pk}"' not in html
        world.act(site, action, post="yes", count="1", select_across="1")
        assert AgentSession.objects.get(pk=world.theirs.pk).item_count == 2
        counts = AgentSession.objects.filter(pk=world.ours.pk)
        assert list(counts.values_list("item_count", flat=True)) in ([0], [])

    @pytest.mark.parametrize("form", ["json", "markdown"])
    def test_exports(self, world: World, site: str, form: str) -> None:
        for across in ("0", "1"):
            found = text(world.act(site, f"export_{form}", select_across=across))
            assert "ours-id" in found
            assert "theirs" not in found
        assert not LogEntry.objects.filter(object_repr="theirs-id").exists()

    def test_statistics(self, world: World, site: str) -> None:
        html = text(world.get(site, "agentsession_overview"))
        assert ">us<" in html
        assert ">them<" not in html
        assert "1 run waits for approval." in html
        assert ">154<" not in html

    def test_runs(self, world: World, site: str) -> None:
        html = text(world.get(site, "agentrun_changelist"))
        assert "ours-run" in html
        assert "1 run waits for approval." in html
        assert "1 agent run" in html
        assert "theirs" not in html
        html = text(
            world.get(
                site, "agentrun_changelist", session__id__exact=str(world.theirs.pk)
            )
        )
        assert "0 agent runs" in html
        ours, theirs = AgentRun.objects.order_by("pk")
        assert "First line of ours-id" in text(
            world.get(site, "agentrun_change", ours.pk)
        )
        for name in ("agentrun_change", "agentrun_history"):
            response = world.get(site, name, theirs.pk)
            assert response.status_code == 302
            assert "theirs" not in text(response)


class TestRead:
    def test_pages(self, world: World) -> None:
        for name, args, status in PAGES:
            needs = "item" in name or "export" in name
            response = world.get("read", name, world.theirs.pk, *args)
            assert response.status_code == (403 if needs else status), name
            html = text(response)
            assert "First line" not in html
            assert at("read", "agentsession_export", world.theirs.pk, "json") not in (
                html
            )
            own = world.get("read", name, world.ours.pk, *args)
            assert own.status_code == status

    def test_the_list_quotes_what_may_be_read(self, world: World) -> None:
        html = text(world.get("read", "agentsession_changelist"))
        assert "First line of ours-id" in html
        assert "theirs-id" in html
        assert "First line of theirs" not in html

    @pytest.mark.parametrize("word", ["First", "theirs", "line of ours"])
    def test_titles_are_not_searched(self, world: World, word: str) -> None:
        html = text(world.get("read", "agentsession_changelist", q=f"{word} "))
        expected = "1 agent session" if word == "theirs" else "0 agent sessions"
        assert expected in html
        lookup = {"title__startswith": "F"}
        response = world.get("read", "agentsession_changelist", **lookup)
        assert response.status_code == 400

    @pytest.mark.parametrize("form", ["json", "markdown"])
    def test_exports_leave_out_and_tell(self, world: World, form: str) -> None:
        found = text(world.act("read", f"export_{form}"))
        assert "First line of ours-id" in found
        assert "theirs" not in found
        assert world.told() == ["1 session was left out: you may not do this to it."]
        assert set(LogEntry.objects.values_list("object_repr", flat=True)) == {
            "ours-id"
        }

    def test_nothing_is_exported_where_nothing_may_be(self, world: World) -> None:
        data = {"action": "export_json", "_selected_action": [world.theirs.pk]}
        response = world.client.post(at("read", "agentsession_changelist"), data)
        assert response.status_code == 302
        assert not LogEntry.objects.exists()

    def test_confirmations_name_no_title(self, world: World) -> None:
        for action in ("clear_history", "delete_selected"):
            html = text(world.act("read", action))
            assert "First line of ours-id" in html
            assert "theirs-id" in html
            assert "First line of theirs" not in html

    @pytest.mark.parametrize("site", ["read", "stranger", "alone"])
    def test_runs_ask_the_admin_of_sessions(self, world: World, site: str) -> None:
        ours, theirs = AgentRun.objects.order_by("pk")
        html = text(world.get(site, "agentrun_change", theirs.pk))
        assert "theirs-run" in html
        assert "theirs-tool" in html
        for secret in ("First line", "theirs-argument", "theirs-usage"):
            assert secret not in html
        assert "but not read its messages" in html
        assert not LogEntry.objects.exists()
        html = text(world.get(site, "agentrun_change", ours.pk))
        assert ("First line of ours-id" in html) is (site == "read")
        assert ("ours-usage" in html) is (site == "read")


class TestClear:
    def test_page(self, world: World) -> None:
        address = at("clear", "agentsession_clear", world.theirs.pk)
        assert world.client.get(address).status_code == 403
        done = world.client.post(address, {"post": "yes", "count": "1"})
        assert done.status_code == 403
        change = text(world.get("clear", "agentsession_change", world.theirs.pk))
        assert "First line of theirs" in change
        assert address not in change
        assert AgentSession.objects.get(pk=world.theirs.pk).item_count == 2

    def test_action(self, world: World) -> None:
        html = text(world.act("clear", "clear_history"))
        assert "Sessions: 1" in html
        assert "1 session was left out" in html
        assert "theirs" not in html
        # What was agreed to is counted without what is left out.
        world.act("clear", "clear_history", post="yes", count="2")
        assert AgentSession.objects.get(pk=world.ours.pk).item_count == 2
        world.act("clear", "clear_history", post="yes", count="1")
        assert AgentSession.objects.get(pk=world.ours.pk).item_count == 0
        assert AgentSession.objects.get(pk=world.theirs.pk).item_count == 2


class TestDelete:
    def test_page(self, world: World) -> None:
        for site in ("delete", "stock"):
            address = at(site, "agentsession_delete", world.theirs.pk)
            assert world.client.get(address).status_code == 403
            assert world.client.post(address, {"post": "yes"}).status_code == 403
            change = text(world.get(site, "agentsession_change", world.theirs.pk))
            assert address not in change
        assert AgentSession.objects.count() == 2

    def test_action(self, world: World) -> None:
        html = text(world.act("delete", "delete_selected"))
        assert "ours-id" in html
        assert "1 session was left out" in html
        assert f'value="{world.theirs.pk}"' not in html
        world.act("delete", "delete_selected", post="yes")
        assert list(AgentSession.objects.values_list("session_id", flat=True)) == [
            "theirs-id"
        ]
        assert world.told() == [
            "1 session was left out: you may not do this to it.",
            "Deleted 1 session.",
        ]

    def test_an_action_of_djangos_own_refuses_all(self, world: World) -> None:
        html = text(world.act("stock", "delete_selected"))
        assert "Cannot delete agent sessions" in html
        assert world.act("stock", "delete_selected", post="yes").status_code == 403
        assert AgentSession.objects.count() == 2

    @pytest.mark.parametrize("site", ["delete", "view"])
    def test_the_hook_that_deletes_rows(self, world: World, site: str, rf: Any) -> None:
        request = rf.get("/")
        request.user = get_user_model().objects.get(username="staff")
        model_admin = SITES[site].get_model_admin(AgentSession)
        model_admin.delete_queryset(request, AgentSession.objects.all())
        assert [str(row) for row in AgentSession.objects.all()] == ["theirs-id"]

    @pytest.mark.parametrize("site", ["delete", "view"])
    def test_their_owner_is_not_deleted_with_them(
        self, world: World, site: str
    ) -> None:
        address = reverse(f"{site}:auth_user_delete", args=(world.them.pk,))
        assert "permission to delete" in page(world.client, address)
        assert world.client.post(address, {"post": "yes"}).status_code == 403
        address = reverse(f"{site}:auth_user_delete", args=(world.us.pk,))
        assert 'type="submit" value="Yes,' in page(world.client, address)


@pytest.mark.parametrize("site", ["one run", "own runs"])
def test_runs_have_rules_of_their_own(world: World, site: str) -> None:
    html = text(world.get(site, "agentrun_changelist"))
    assert "ours-run" in html
    assert "theirs" not in html
    assert "1 run waits for approval." in html
    theirs = AgentRun.objects.get(run_id="theirs-run")
    assert world.get(site, "agentrun_change", theirs.pk).status_code == 302


def test_the_overview_counts_the_runs_that_one_may_view(world: World) -> None:
    html = text(world.get("own runs", "agentsession_overview"))
    assert "1 run waits for approval." in html


@pytest.mark.parametrize(
    ("site", "name"),
    [
        *((site, "agentsession_changelist") for site in (*HIDING, "read")),
        *((site, "agentrun_changelist") for site in (*HIDING, "read", "alone")),
        ("one run", "agentrun_changelist"),
        ("view", "agentsession_overview"),
    ],
)
def test_pages_take_as_many_queries_as_before(
    world: World, site: str, name: str
) -> None:
    world.get(site, name)
    with CaptureQueriesContext(connection) as few:
        world.get(site, name)
    for number in range(30):
        world.make(f"more{number}", (world.us, world.them)[number % 2])
    with CaptureQueriesContext(connection) as many:
        world.get(site, name)
    assert len(many) == len(few)


@pytest.mark.parametrize("field", ["session", "resumed_by"])
def test_suggestions_take_as_many_queries_as_before(world: World, field: str) -> None:
    given = {"app_label": "agent_sessions", "model_name": "agentrun"}
    query = urlencode({**given, "field_name": field})
    place = f"{reverse('view:autocomplete')}?{query}"
    world.client.get(place)
    with CaptureQueriesContext(connection) as few:
        world.client.get(place)
    for number in range(15):
        world.make(f"more{number}", (world.us, world.them)[number % 2])
    with CaptureQueriesContext(connection) as many:
        world.client.get(place)
    assert len(many) == len(few)


def test_an_overview_of_very_many_is_refused_not_slow(world: World) -> None:
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"s{number}") for number in range(1_000)
    )
    assert world.get("view", "agentsession_overview").status_code == 403
    assert world.get("queryset", "agentsession_overview").status_code == 200


def test_without_rules_a_list_of_runs_joins_no_sessions() -> None:
    client: Client = staff(*RIGHTS, runs=True)
    with CaptureQueriesContext(connection) as queries:
        client.get(at("admin", "agentrun_changelist"))
    asked = [q["sql"] for q in queries if "agent_sessions_agentrun" in q["sql"]]
    assert asked
    assert not [sql for sql in asked if "IN (SELECT" in sql and "NOT" not in sql]


def test_a_hook_that_wraps_ours_is_the_project_s_own() -> None:
    view: Any = AgentSessionAdmin.has_view_permission

    def ask(self: Any, request: HttpRequest, obj: Any = None) -> bool:
        return bool(view(self, request, obj))

    hooks = {"has_view_permission": wraps(view)(ask), "__module__": __name__}
    wrapped: Any = type("Wrapped", (AgentSessionAdmin,), hooks)
    assert wrapped(AgentSession, admin.site).asks_rows()
    assert not AgentSessionAdmin(AgentSession, admin.site).asks_rows()
