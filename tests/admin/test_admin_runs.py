"""The runs of agents in Django's admin."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import (
    XSS,
    Markup,
    assert_safe,
    make,
    make_run,
    page,
    staff,
    url,
)
from tests.support.waiting import asked, wait

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

RUNS = "admin:agent_sessions_agentrun_changelist"


def run_url(run: AgentRun) -> str:
    return reverse("admin:agent_sessions_agentrun_change", args=(run.pk,))


@pytest.fixture
def reader() -> Client:
    return staff("view", "read", runs=True)


class TestList:
    def test_columns(self, reader: Client) -> None:
        started = timezone.now() - timedelta(minutes=3)
        make_run(
            make(),
            run_id="run-1",
            agent_name="Billing",
            model="gpt-x",
            input_tokens=12345,
            output_tokens=67,
            started_at=started,
            finished_at=started + timedelta(seconds=83),
            status="failed",
            error_code="model_error",
        )
        html = page(reader, reverse(RUNS))
        for text in (
            "run-1",
            "chat",
            "Billing",
            "gpt-x",
            "12,345 / 67",
            "1 min 23 s",
            "model_error",
            '<span class="as-state as-state-failed">failed</span>',
        ):
            assert text in html
        assert "waits for approval" not in html

    def test_what_waits_stands_out_with_its_tool(self, reader: Client) -> None:
        row = make()
        make_run(row, run_id="done")
        wait(row, "run-2")
        html = page(reader, reverse(RUNS))
        assert '<a href="?status__exact=waiting">1 run waits for approval.</a>' in html
        assert "waiting for approval</span> <code>refund</code>" in html
        assert (
            "order" not in html.partition('id="result_list"')[2].partition("Filter")[0]
        )
        html = page(reader, f"{reverse(RUNS)}?status__exact=waiting")
        assert ">done<" not in html

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("q=new", {"new"}),
            ("q=chat", {"new", "old"}),
            ("q=ne", set()),
            ("days=1", {"new"}),
            ("days=30", {"new", "old"}),
            ("days=x", {"new", "old"}),
            ("status__exact=failed", {"old"}),
        ],
    )
    def test_search_and_filters(
        self, reader: Client, query: str, found: set[str]
    ) -> None:
        row = make()
        make_run(row, run_id="new")
        before = timezone.now() - timedelta(days=9)
        make_run(row, run_id="old", started_at=before, status="failed")
        html = page(reader, f"{reverse(RUNS)}?{query}")
        assert {name for name in ("new", "old") if f">{name}</a>" in html} == found

    def test_the_runs_of_one_session(self, reader: Client) -> None:
        first, second = make("first"), make("second")
        make_run(first, run_id="one")
        make_run(second, run_id="two")
        address = f"{reverse(RUNS)}?session__id__exact={first.pk}"
        assert address in page(reader, url("change", first))
        html = page(reader, address)
        assert ">one</a>" in html
        assert ">two</a>" not in html

    def test_runs_of_what_is_being_deleted_are_left_out(self, reader: Client) -> None:
        row = make()
        make_run(row, run_id="gone")
        AgentSession.objects.filter(pk=row.pk).update(removed_at=timezone.now())
        assert "gone" not in page(reader, reverse(RUNS))

    def test_queries_are_the_same_for_one_run_and_a_thousand(
        self, reader: Client
    ) -> None:
        wait(make())
        reader.get(reverse(RUNS))
        with CaptureQueriesContext(connection) as few:
            reader.get(reverse(RUNS))
        for number in range(60):
            wait(make(f"chat {number}"))
        row = make("more")
        AgentRun.objects.bulk_create(
            AgentRun(session=row, run_id=f"r{n}", status="waiting", state="old")
            for n in range(940)
        )
        with CaptureQueriesContext(connection) as many:
            html = page(reader, reverse(RUNS))
        assert len(few) == len(many) <= 8
        assert "1,001 runs wait for approval." in html


class TestRun:
    def test_header_usage_and_items(self, reader: Client) -> None:
        user = get_user_model().objects.create_user("alice")
        row = make(
            "chat",
            *({"role": "user", "content": f"m{n}."} for n in range(9)),
            user=user,
        )
        started = timezone.now()
        run = make_run(
            row,
            run_id="run-1",
            agent_name="Billing",
            model="gpt-x",
            trace_id="trace_1",
            first_position=3,
            last_position=5,
            cached_tokens=1234,
            usage={"input_tokens_details": [{"cached_tokens": 1234}]},
            started_at=started,
            finished_at=started + timedelta(seconds=2.5),
        )
        html = page(reader, run_url(run))
        for text in (
            "Billing",
            "gpt-x",
            "trace_1",
            "1,234",
            "2.5 s",
            "alice",
            "completed",
            "&quot;cached_tokens&quot;: 1234",
            url("change", row),
            url("item", row, 3),
        ):
            assert text in html
        assert [n for n in range(9) if f">m{n}.<" in html] == [2, 3, 4]
        assert "Delete" not in html
        assert 'name="_save"' not in html
        markup = Markup(html)
        assert len(markup.ids) == len(set(markup.ids))
        entry = LogEntry.objects.get()
        assert (entry.object_repr, entry.change_message) == ("chat", "Read run run-1.")

    def test_long_runs_show_their_beginning(self, reader: Client) -> None:
        row = make("chat", *({"role": "user", "content": f"m{n}."} for n in range(150)))
        run = make_run(row, first_position=1, last_position=150)
        html = page(reader, run_url(run))
        assert ">m99.<" in html
        assert ">m100.<" not in html
        assert "There are more; see the session." in html

    def test_approvals_show_tool_and_arguments(self, reader: Client) -> None:
        run = wait(make())
        html = page(reader, run_url(run))
        assert "Waiting for approval" in html
        assert "<strong>refund</strong>" in html
        assert "&quot;order&quot;: 42" in html
        assert LogEntry.objects.count() == 1

    def test_contents_need_the_right_to_read(self) -> None:
        row = make()
        run = wait(row, first_position=1, last_position=2)
        html = page(staff("view", runs=True), run_url(run))
        assert "<strong>refund</strong>" in html
        assert "order" not in html.partition("as-asked")[2]
        assert "You may not read the arguments." in html
        assert "First line" not in html
        assert "but not read its messages" in html
        assert not LogEntry.objects.exists()

    @pytest.mark.parametrize("interrupts", [[1, None], [{"metadata": 3}], "x"])
    def test_odd_approvals_are_no_error(self, reader: Client, interrupts: Any) -> None:
        run = wait(make(), interrupts=interrupts)
        assert "run-1" in page(reader, run_url(run))
        page(reader, reverse(RUNS))

    @pytest.mark.parametrize(
        "text", ["{broken", "[" * 100_000, '{"__enc__": 1}', "a:b", "\ufffd:\n:"]
    )
    def test_what_does_not_open_is_not_shown(self, reader: Client, text: str) -> None:
        run = wait(make())
        AgentRun.objects.update(state=text)
        for address in (run_url(run), reverse(RUNS)):
            html = page(reader, address)
            assert "run-1" in html
            assert "refund" not in html
            assert "as-state-waiting" not in html

    def test_a_run_without_items(self, reader: Client) -> None:
        run = make_run(make())
        assert "This run left no items." in page(reader, run_url(run))

    def test_a_run_whose_items_were_cleared(self, reader: Client) -> None:
        row = make()
        run = make_run(row, first_position=1, last_position=2)
        from agent_sessions.retention import Removal, remove

        remove(row, Removal())
        assert "This run left no items." in page(reader, run_url(run))

    def test_a_store_that_is_not_configured_is_told(self, reader: Client) -> None:
        row = AgentSession.objects.create(session_id="old", backend="gone")
        run = make_run(row, first_position=1, last_position=2)
        assert "has no alias &#x27;gone&#x27;" in page(reader, run_url(run))

    def test_a_resumed_run_leads_to_the_next(self, reader: Client) -> None:
        row = make()
        second = make_run(row, run_id="second")
        first = make_run(row, run_id="first", resumed_by=second)
        assert f'<a href="{run_url(second)}">second</a>' in page(reader, run_url(first))

    def test_hostile_contents_stay_text(self, reader: Client) -> None:
        user = get_user_model().objects.create_user(XSS)
        row = make(XSS, {"role": "user", "content": XSS}, user=user)
        run = make_run(
            row,
            run_id=XSS[:64],
            agent_name=XSS,
            model=XSS,
            status=XSS[:16],
            error_code=XSS[:64],
            trace_id=XSS[:64],
            sdk_version=XSS[:32],
            usage={XSS: XSS},
            first_position=1,
            last_position=1,
        )
        waits = wait(row, "waits", interrupts=asked(XSS, XSS))
        for address in (
            run_url(run),
            run_url(waits),
            reverse(RUNS),
            url("change", row),
        ):
            html = page(reader, address)
            assert_safe(html)
            assert "&lt;script&gt;alert(1)" in html


class TestRights:
    def test_nobody_writes(self) -> None:
        run = make_run(make())
        client = Client()
        root = get_user_model().objects.create_superuser("root", password="x")
        client.force_login(root)
        delete = reverse("admin:agent_sessions_agentrun_delete", args=(run.pk,))
        add = reverse("admin:agent_sessions_agentrun_add")
        for address in (delete, add):
            assert client.get(address).status_code == 403
            assert client.post(address, {"post": "yes"}).status_code == 403
        assert client.post(run_url(run), {"status": "failed"}).status_code == 403
        assert client.post(
            reverse(RUNS), {"action": "delete_selected", "_selected_action": run.pk}
        ).status_code in {200, 302}
        assert AgentRun.objects.get().status == "completed"

    def test_deleting_a_user_takes_their_runs_along(self) -> None:
        alice = get_user_model().objects.create_user("alice")
        make_run(make(user=alice))
        client = staff("view", "delete")
        user = get_user_model().objects.get(username="staff")
        user.user_permissions.add(
            *Permission.objects.filter(codename__in=["view_user", "delete_user"])
        )
        client = Client()
        client.force_login(user)
        address = reverse("admin:auth_user_delete", args=(alice.pk,))
        html = page(client, address)
        assert 'type="submit" value="Yes,' in html

    def test_links_between_pages_follow_the_rights(self) -> None:
        row = make()
        run = make_run(row, first_position=1, last_position=2)
        html = page(staff("view", "read"), url("change", row))
        assert run_url(run) not in html
        assert reverse(RUNS) not in html
        assert "run-1" in html
        html = page(staff(runs=True, name="other"), run_url(run))
        assert url("change", row) not in html
