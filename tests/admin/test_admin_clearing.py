"""Clear and delete in Django's admin."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin import site
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.support.admin_pages import (
    LIST,
    assert_safe,
    make,
    messages,
    page,
    staff,
    url,
)
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


class TestClear:
    def test_asks_first_and_tells_what_would_go(self, alice: Any) -> None:
        row = make(user=alice)
        client = staff("view", "clear", "read")
        html = page(client, url("clear", row))
        for text in (
            "cannot be undone",
            "Sessions: 1",
            "Items: 2",
            "Owners: 1",
            "First line of chat",
        ):
            assert text in html
        client.post(url("clear", row), {})
        assert AgentSession.objects.get().item_count == 2

    @pytest.mark.parametrize("name", ["clear", "export"])
    def test_a_session_that_is_gone_is_told(self, alice: Any, name: str) -> None:
        row = make(user=alice)
        client = staff("view", "clear", "read", "export")
        args = ["markdown"] if name == "export" else []
        address = url(name, row, *args)
        AgentSession.objects.all().delete()
        response = client.get(address, follow=True)
        assert response.redirect_chain == [
            (url("change", row), 302),
            (reverse("admin:index"), 302),
        ]
        assert "Perhaps it was deleted?" in messages(response)[0]

    def test_clears_one_and_logs_it(self, alice: Any) -> None:
        row = make(user=alice, input_tokens=7)
        client = staff("view", "clear")
        response = client.post(
            url("clear", row), {"post": "yes", "count": "1"}, follow=True
        )
        assert response.redirect_chain == [(url("change", row), 302)]
        assert messages(response) == ["Cleared 1 session with 2 items."]
        row.refresh_from_db()
        assert (row.item_count, row.title, row.user, row.input_tokens) == (
            0,
            "",
            alice,
            7,
        )
        entry = LogEntry.objects.get()
        assert entry.change_message == "Cleared 2 items."
        assert entry.object_repr == "chat"

    def test_action_asks_and_clears(self) -> None:
        rows = [make(f"s{n}") for n in range(3)]
        client = staff("view", "clear", "read")
        data = {"action": "clear_history", "_selected_action": [r.pk for r in rows[:2]]}
        html = client.post(reverse(LIST), data).content.decode()
        assert "Sessions: 2" in html
        assert_safe(html)
        form = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', html))
        assert (
            form.items()
            >= {
                "action": "clear_history",
                "count": "2",
                "post": "yes",
                "select_across": "0",
            }.items()
        )
        response = client.post(
            reverse(LIST), {**data, "post": "yes", "count": "2"}, follow=True
        )
        assert messages(response) == ["Cleared 2 sessions with 4 items."]
        assert sorted(AgentSession.objects.values_list("item_count", flat=True)) == [
            0,
            0,
            2,
        ]

    def test_action_over_all_pages_sends_one_key(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(1_100)
        )
        first = AgentSession.objects.first()
        assert first is not None
        client = staff("view", "clear")
        data = {
            "action": "clear_history",
            "_selected_action": first.pk,
            "select_across": "1",
        }
        html = client.post(reverse(LIST), data).content.decode()
        assert html.count('name="_selected_action"') == 1
        assert "Sessions: 1100" in html
        assert "and 1080 more" in html
        response = client.post(
            reverse(LIST), {**data, "post": "yes", "count": "1100"}, follow=True
        )
        assert messages(response) == ["Cleared 1100 sessions with 0 items."]

    def test_asks_again_where_there_are_more_by_now(self) -> None:
        row = make("one")
        client = staff("view", "clear")
        data = {
            "action": "clear_history",
            "_selected_action": row.pk,
            "select_across": "1",
            "post": "yes",
            "count": "1",
        }
        make("two")
        assert "Sessions: 2" in client.post(reverse(LIST), data).content.decode()
        assert set(AgentSession.objects.values_list("item_count", flat=True)) == {2}

    def test_leaves_active_runs_and_names_them(self) -> None:
        busy = make("busy", run_id="r", run_seen_at=timezone.now(), state="running")
        dead = make(
            "dead", run_id="r", run_seen_at=timezone.now() - timedelta(minutes=2)
        )
        data = {
            "action": "clear_history",
            "_selected_action": [busy.pk, dead.pk],
            "post": "yes",
            "count": "2",
        }
        response = staff("view", "clear").post(reverse(LIST), data, follow=True)
        assert messages(response) == [
            "Not cleared, because a run is active: busy.",
            "Cleared 1 session with 2 items.",
        ]
        busy.refresh_from_db()
        assert busy.item_count == 2

    def test_a_store_that_fails_is_told(self) -> None:
        row = AgentSession.objects.create(
            session_id="old", backend="gone", item_count=3
        )
        response = staff("view", "clear").post(
            url("clear", row), {"post": "yes", "count": "1"}, follow=True
        )
        (message,) = messages(response)
        assert message.startswith("old was left as it is: AGENT_SESSIONS has no alias")
        assert not LogEntry.objects.exists()

    def test_needs_the_csrf_token(self) -> None:
        row = make()
        staff("view", "clear")
        client = Client(enforce_csrf_checks=True)
        client.force_login(get_user_model().objects.get(username="staff"))
        assert (
            client.post(url("clear", row), {"post": "yes", "count": "1"}).status_code
            == 403
        )


class TestDelete:
    def test_deletes_one_with_all_that_belongs_to_it(self, alice: Any) -> None:
        row = make(user=alice)
        client = staff("view", "delete")
        html = page(client, url("delete", row))
        assert "Items: 2" in html
        response = client.post(url("delete", row), {"post": "yes"}, follow=True)
        assert response.status_code == 200
        for model in (AgentSession, Branch, SessionItem):
            assert not model.objects.exists()
        assert LogEntry.objects.get().object_repr == "chat"

    def test_pages_of_a_long_session_take_few_queries(self) -> None:
        row = make("long", *({"role": "user", "content": str(n)} for n in range(3_000)))
        client = staff("view", "delete")
        html = page(client, url("delete", row))
        assert "Items: 3000" in html
        assert len(html) < 20_000

    def test_action_deletes_and_tells(self) -> None:
        rows = [make(f"s{n}") for n in range(3)]
        client = staff("view", "delete")
        data = {
            "action": "delete_selected",
            "_selected_action": [r.pk for r in rows[:2]],
        }
        html = client.post(reverse(LIST), data).content.decode()
        assert "Items: 4" in html
        assert "First line" not in html
        response = client.post(reverse(LIST), {**data, "post": "yes"}, follow=True)
        assert messages(response) == ["Deleted 2 sessions."]
        assert AgentSession.objects.count() == 1
        assert set(LogEntry.objects.values_list("object_repr", flat=True)) == {
            "s0",
            "s1",
        }

    def test_many_are_counted(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(25)
        )
        keys = list(AgentSession.objects.values_list("pk", flat=True))
        data = {"action": "delete_selected", "_selected_action": keys}
        html = staff("view", "delete").post(reverse(LIST), data).content.decode()
        assert "and 5 more" in html

    def test_all_of_a_long_list_need_one_key(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(1_100)
        )
        first = AgentSession.objects.first()
        assert first is not None
        client = staff("view", "delete")
        data = {
            "action": "delete_selected",
            "_selected_action": first.pk,
            "select_across": "1",
        }
        html = client.post(reverse(LIST), data).content.decode()
        assert html.count('name="_selected_action"') == 1
        assert 'name="select_across" value="1"' in html
        assert "Sessions: 1100" in html
        data |= {"post": "yes", "count": "1100"}
        make("new")
        assert "Sessions: 1101" in client.post(reverse(LIST), data).content.decode()
        response = client.post(reverse(LIST), {**data, "count": "1101"}, follow=True)
        assert messages(response) == ["Deleted 1101 sessions."]
        assert not AgentSession.objects.exists()

    def test_a_store_that_fails_leaves_its_row(self) -> None:
        gone = AgentSession.objects.create(session_id="old", backend="gone")
        row = make()
        client = staff("view", "delete")
        data = {
            "action": "delete_selected",
            "_selected_action": [gone.pk, row.pk],
            "post": "yes",
        }
        told = messages(client.post(reverse(LIST), data, follow=True))
        assert told[0].startswith("old was left as it is: AGENT_SESSIONS has no alias")
        assert told[1:] == ["Deleted 1 session."]
        again = {**data, "_selected_action": [gone.pk]}
        response = client.post(reverse(LIST), again, follow=True)
        assert len(messages(response)) == 1
        response = client.post(url("delete", gone), {"post": "yes"}, follow=True)
        assert messages(response)[0].startswith("old was left as it is")
        assert list(AgentSession.objects.values_list("session_id", flat=True)) == [
            "old"
        ]
        assert LogEntry.objects.count() == 1

    def test_hooks_of_the_model_admin_clear_too(self, rf: Any) -> None:
        admin = site.get_model_admin(AgentSession)
        make("one")
        make("two")
        admin.delete_queryset(rf.get("/"), AgentSession.objects.all())
        assert not SessionItem.objects.exists()


class TestWaiting:
    """A session that waits for an approval, which goes with its history."""

    ONE = "1 session waits for an approval, which nobody can give any more then."
    TWO = "2 sessions wait for approvals, which nobody can give any more then."

    def test_clearing_says_what_is_withdrawn(self) -> None:
        row, idle = make(), make("idle")
        wait(row)
        client = staff("view", "clear")
        html = page(client, url("clear", row))
        assert self.ONE in html
        assert "waits for an approval" not in page(client, url("clear", idle))
        response = client.post(
            url("clear", row), {"post": "yes", "count": "1", "waiting": "1"}
        )
        assert response.status_code == 302
        assert AgentSession.objects.get(pk=row.pk).item_count == 0

    def test_one_that_has_begun_to_wait_is_asked_about_again(self) -> None:
        row = make()
        client = staff("view", "clear")
        page(client, url("clear", row))
        wait(row)
        for told in ("0", "2", "none"):
            response = client.post(
                url("clear", row), {"post": "yes", "count": "1", "waiting": told}
            )
            assert self.ONE in response.content.decode()
        assert AgentSession.objects.get().item_count == 2

    def test_the_actions_say_so_too(self) -> None:
        rows = [make(f"chat-{n}") for n in range(3)]
        for row in rows[:2]:
            wait(row, run_id=row.session_id)
        client = staff("view", "clear", "delete")
        for action in ("clear_history", "delete_selected"):
            html = client.post(
                reverse(LIST),
                {"action": action, "_selected_action": [row.pk for row in rows]},
            ).content.decode()
            assert self.TWO in html
        assert AgentSession.objects.count() == 3

    def test_deleting_says_so_too(self) -> None:
        row, idle = make(), make("idle")
        wait(row)
        client = staff("view", "delete")
        assert self.ONE in page(client, url("delete", row))
        assert "waits for an approval" not in page(client, url("delete", idle))

    def test_one_that_is_over_is_not_told(self) -> None:
        row = make()
        wait(row, expires_in=-timedelta(minutes=1))
        client = staff("view", "clear")
        assert "waits for an approval" not in page(client, url("clear", row))
