"""Who may see and do what in Django's admin."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.test import Client
from django.urls import reverse

from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import (
    LIST,
    RIGHTS,
    make,
    make_run,
    messages,
    page,
    staff,
    url,
)

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


# What each page answers to someone who holds just these rights: list, overview,
# session, raw item, exports as JSON and Markdown, page to clear, page to delete, page
# to add, list of runs, a run, page to delete a run, page to add one.
PERMISSIONS: dict[tuple[str, ...], tuple[int, ...]] = {
    (): (403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("read",): (403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("clear",): (403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("add",): (403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("change",): (403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("delete",): (403, 403, 403, 403, 403, 403, 403, 200, 403, 403, 403, 403, 403),
    ("view",): (200, 200, 200, 403, 403, 403, 403, 403, 403, 403, 403, 403, 403),
    ("view", "read"): (
        *(200, 200, 200, 200, 200, 200, 403, 403, 403),
        *(403, 403, 403, 403),
    ),
    ("view", "clear"): (
        *(200, 200, 200, 403, 403, 403, 200, 403, 403),
        *(403, 403, 403, 403),
    ),
    ("view", "delete"): (
        *(200, 200, 200, 403, 403, 403, 403, 200, 403),
        *(403, 403, 403, 403),
    ),
    ("view", "add", "change"): (
        *(200, 200, 200, 403, 403, 403, 403, 403, 403),
        *(403, 403, 403, 403),
    ),
    ("runs",): (403, 403, 403, 403, 403, 403, 403, 403, 403, 200, 200, 403, 403),
    RIGHTS: (
        *(200, 200, 200, 200, 200, 200, 200, 200, 403),
        *(403, 403, 403, 403),
    ),
    (*RIGHTS, "runs"): (
        *(200, 200, 200, 200, 200, 200, 200, 200, 403),
        *(200, 200, 403, 403),
    ),
}
# Actions on the list, the right that each needs, and what it leaves of two items.
ACTIONS = {
    "clear_history": ("clear", 0),
    "delete_selected": ("delete", None),
    "export_json": ("read", 2),
    "export_markdown": ("read", 2),
}


def addresses(row: AgentSession) -> tuple[str, ...]:
    run = AgentRun.objects.filter(session=row).first() or make_run(row)
    return (
        reverse(LIST),
        reverse("admin:agent_sessions_agentsession_overview"),
        url("change", row),
        url("item", row, 1),
        url("export", row, "json"),
        url("export", row, "markdown"),
        url("clear", row),
        url("delete", row),
        reverse("admin:agent_sessions_agentsession_add"),
        reverse("admin:agent_sessions_agentrun_changelist"),
        reverse("admin:agent_sessions_agentrun_change", args=(run.pk,)),
        reverse("admin:agent_sessions_agentrun_delete", args=(run.pk,)),
        reverse("admin:agent_sessions_agentrun_add"),
    )


def hired(rights: tuple[str, ...]) -> Client:
    return staff(*(r for r in rights if r != "runs"), runs="runs" in rights)


class TestPermissions:
    @pytest.mark.parametrize(("rights", "expected"), PERMISSIONS.items())
    @pytest.mark.parametrize("owned", [False, True])
    def test_pages(
        self,
        rights: tuple[str, ...],
        expected: tuple[int, ...],
        owned: bool,
        alice: Any,
    ) -> None:
        row = make(user=alice if owned else None)
        client = hired(rights)
        found = tuple(client.get(address).status_code for address in addresses(row))
        assert found == expected

    @pytest.mark.parametrize("rights", PERMISSIONS)
    @pytest.mark.parametrize("action", ACTIONS)
    @pytest.mark.parametrize("owned", [False, True])
    def test_actions(
        self, rights: tuple[str, ...], action: str, owned: bool, alice: Any
    ) -> None:
        right, left = ACTIONS[action]
        row = make(user=alice if owned else None)
        data = {"action": action, "_selected_action": row.pk, "post": "yes"}
        response = hired(rights).post(reverse(LIST), {**data, "count": "1"})
        may = {"view", right} <= set(rights)
        count = AgentSession.objects.values_list("item_count", flat=True).first()
        assert count == (left if may else 2)
        assert response.streaming is (may and right == "read")

    @pytest.mark.parametrize("rights", PERMISSIONS)
    def test_deeds(self, rights: tuple[str, ...]) -> None:
        row = make()
        client = hired(rights)
        client.post(url("clear", row), {"post": "yes", "count": "1"})
        assert AgentSession.objects.get().item_count == (
            0 if {"view", "clear"} <= set(rights) else 2
        )
        client.post(url("delete", row), {"post": "yes"})
        assert AgentSession.objects.exists() is ("delete" not in rights)

    def test_nobody_changes_anything(self) -> None:
        row = make()
        client = staff(*RIGHTS)
        response = client.post(url("change", row), {"title": "Mine", "_save": "Save"})
        assert response.status_code == 403
        assert AgentSession.objects.get().title == "First line of chat"

    def test_strangers_are_asked_to_log_in(self, alice: Any) -> None:
        row = make(user=alice)
        owner = Client()
        owner.force_login(alice)
        for client in (Client(), owner):
            for address in addresses(row):
                response = client.get(address)
                assert response.status_code == 302
                assert response["Location"].startswith(django_settings.LOGIN_URL)

    def test_without_the_right_to_read_nothing_said_is_shown(self) -> None:
        row = make()
        client = staff("view", "clear", "delete")
        for address in (
            reverse(LIST),
            url("change", row),
            url("clear", row),
            url("delete", row),
            url("history", row),
            f"{reverse(LIST)}?q=chat",
        ):
            html = page(client, address)
            assert "chat" in html
            assert "First line" not in html
            assert "An answer" not in html
        assert "but not read its messages" in page(client, url("change", row))
        assert "0 agent sessions" in page(client, f"{reverse(LIST)}?q=First")

    def test_links_are_shown_to_those_who_may_follow_them(self) -> None:
        row = make()
        assert url("clear", row) not in page(staff("view"), url("change", row))
        client = staff("view", "clear", name="other")
        assert url("clear", row) in page(client, url("change", row))

    def test_a_session_that_is_gone(self) -> None:
        row = make()
        address = url("clear", row)
        row.delete()
        response = staff(*RIGHTS).get(address, follow=True)
        assert "exist" in messages(response)[0]
