"""The admin's page that asks before a user is deleted, with all that goes along."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.utils import get_deleted_objects
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.management import call_command
from django.db import connection
from django.http import HttpRequest
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from agent_sessions import DjangoSession, sessions
from agent_sessions.admin import AgentSessionAdmin
from agent_sessions.backends.base import SessionKey
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
    SessionSecret,
)
from agent_sessions.retention import removal

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

ROOT = Path(__file__).parents[2]
ITEMS = 20_000
RUNS = 2_000


def make_owner(name: str, *, items: int, runs: int) -> Any:
    """Make the owner of one session with a fork, items on both branches, and runs."""
    alice = get_user_model().objects.create_user(name)
    session = DjangoSession(f"room of {name}", user=alice)
    session.sync.add_items([{"role": "user", "content": "Hi"}])
    row: Any = AgentSession.objects.get(session_id=f"room of {name}")
    fork = Branch.objects.create(
        session=row, name="other", parent=row.branch, fork_position=1, head=1
    )
    SessionItem.objects.bulk_create(
        SessionItem(branch_id=(row.branch_id, fork.pk)[n % 2], position=n, data="{}")
        for n in range(2, items + 1)
    )
    AgentRun.objects.bulk_create(
        AgentRun(session=row, run_id=f"run-{n}") for n in range(runs)
    )
    return alice


def counted(html: str) -> dict[str, int]:
    """Read the page's summary."""
    found = re.findall(r"<li>([A-Z][a-z ]+): ([\d,]+)</li>", html)
    return {name: int(number.replace(",", "")) for name, number in found}


def ask(client: Client, user: Any) -> tuple[str, int]:
    """Open the page; tell how many queries it made."""
    with CaptureQueriesContext(
        connection,
    ) as queries:
        response = client.get(reverse("admin:auth_user_delete", args=(user.pk,)))
    assert response.status_code == 200
    for query in queries.captured_queries:
        # Nothing is read of what is only counted.
        if SessionItem._meta.db_table in query["sql"]:
            assert query["sql"].startswith(("SELECT COUNT(*)", "SELECT SUM("))
    return response.content.decode(), len(queries)


def test_the_page_counts_what_goes_along() -> None:
    long = make_owner("alice", items=ITEMS, runs=RUNS)
    short = make_owner("bob", items=2, runs=1)
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    ask(client, short)
    html, queries = ask(client, long)
    few, fewer_queries = ask(client, short)
    assert counted(html) == {
        "Users": 1,
        "Agent sessions": 1,
        "Branches": 2,
        "Items": ITEMS,
        "Agent runs": RUNS,
    }
    assert "room of alice" in html
    assert "run-1" not in html
    assert queries == fewer_queries < 20
    assert len(html) < len(few) + 1_000


def test_the_page_names_few_of_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests make sites whose admins refuse single sessions.
    monkeypatch.setattr(admin.sites, "all_sites", [admin.site])
    alice = make_owner("alice", items=2, runs=1)
    bob = make_owner("bob", items=2, runs=1)
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"room {n}", user=alice, active_on=f"19{n}-01-01")
        for n in range(10, 99)
    )
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    ask(client, bob)
    html, queries = ask(client, alice)
    assert counted(html)["Agent sessions"] == 90
    named = re.findall(r">room (\w+ ?\w*)</a>", html)
    assert named == ["of alice", *(str(n) for n in range(98, 79, -1))]
    assert queries == ask(client, bob)[1] <= 12
    # Nobody deletes sessions by deleting users.
    staff = get_user_model().objects.create_user("staff", is_staff=True)
    right = Permission.objects.get(codename="delete_user")
    staff.user_permissions.add(right)
    client.force_login(staff)
    address = reverse("admin:auth_user_delete", args=(alice.pk,))
    assert "agent session" in str(client.get(address).context["perms_lacking"])
    assert client.post(address, {"post": "yes"}).status_code == 403


class Careful(AgentSessionAdmin):
    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None or obj.session_id != "kept"


def test_each_session_is_asked_for_where_one_may_be_refused() -> None:
    careful = admin.AdminSite(name="careful")
    careful.register(AgentSession, Careful)
    careful.register(get_user_model())
    alice = make_owner("alice", items=2, runs=1)
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"room {n}", user=alice) for n in range(30)
    )
    oldest = {"session_id": "kept", "active_on": "2001-01-01"}
    AgentSession.objects.create(user=alice, **oldest)
    request = RequestFactory().get("/")
    request.user = get_user_model().objects.create_superuser("root")
    lacking = get_deleted_objects([alice], request, careful)[2]
    assert lacking == {AgentSession._meta.verbose_name}


def test_the_user_goes_with_everything() -> None:
    alice, bob = (make_owner(name, items=4, runs=2) for name in ("alice", "bob"))
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    address = reverse("admin:auth_user_delete", args=(alice.pk,))
    client.post(address, {"post": "yes"})
    assert not get_user_model().objects.filter(pk=alice.pk).exists()
    for model, owner in (
        (AgentSession, "user"),
        (Branch, "session__user"),
        (AgentRun, "session__user"),
        (SessionItem, "branch__session__user"),
    ):
        left = model._default_manager.values_list(owner, flat=True)
        assert set(left) == {bob.pk}


@pytest.mark.parametrize("sessions", [1, 40])
@pytest.mark.django_db(transaction=True)
def test_the_user_s_transaction_loads_and_deletes_no_items(
    sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is.
    monkeypatch.setattr(removal, "COMMIT_SECONDS", 600)
    alice = make_owner("alice", items=2_000 // sessions, runs=600 // sessions)
    for number in range(1, sessions):
        copy_of(alice, number, items=2_000 // sessions)
    make_owner("bob", items=4, runs=2)
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    with CaptureQueriesContext(connection) as queries:
        address = reverse("admin:auth_user_delete", args=(alice.pk,))
        assert client.post(address, {"post": "yes"}).status_code == 302
    asked = [query["sql"] for query in queries.captured_queries]
    gone = next(
        n
        for n, sql in enumerate(asked)
        if 'FROM "auth_user"' in sql and "DELETE" in sql
    )
    table = SessionItem._meta.db_table
    assert not [sql for sql in asked[:gone] if table in sql and "COUNT" not in sql]
    assert gone < 60
    # A step for each 500 items, or 50 sessions.
    assert len(asked) < 200
    for model in (AgentSession, Branch, AgentRun, SessionItem):
        assert model._base_manager.exists()
    assert set(AgentSession._base_manager.values_list("user__username", flat=True)) == {
        "bob"
    }
    assert SessionItem._base_manager.count() == 4


def copy_of(user: Any, number: int, *, items: int) -> None:
    session = DjangoSession(f"room {number}", user=user)
    session.sync.add_items([{"role": "user", "content": "Hi"}] * items)


@pytest.mark.django_db(transaction=True)
def test_what_a_deletion_leaves_is_deleted_by_the_next_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alice = make_owner("alice", items=4, runs=2)
    monkeypatch.setattr(removal, "COMMIT_SECONDS", 0)
    alice.delete()
    assert not AgentSession.objects.exists()
    assert not SessionItem.objects.exists()
    # Its id is free at once, and is nobody's.
    session = DjangoSession("room of alice").sync
    assert session.get_items() == []
    session.add_items([{"role": "user", "content": "Mine"}])
    assert SessionItem._base_manager.count() == 5
    call_command("clear_agent_sessions")
    assert SessionItem._base_manager.count() == 1


def test_a_deleted_user_s_keys_go_in_the_same_transaction(settings: Any) -> None:
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "private": {
            "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
            "OPTIONS": {
                "backend": "default",
                "keys": ["k" * 43 + "="],
                "session_keys": True,
            },
        },
    }
    alice = get_user_model().objects.create_user("alice")
    key = SessionKey("secret", alice.pk)
    sessions["private"].append(key, [{"role": "user", "content": "Hi"}])
    assert SessionSecret.objects.count() == 1
    alice.delete()
    assert not SessionSecret.objects.exists()
    assert not AgentSession.objects.exists()


def test_the_action_on_users_counts_too() -> None:
    users = [make_owner(name, items=40, runs=3) for name in ("alice", "bob")]
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    html = client.post(
        reverse("admin:auth_user_changelist"),
        {"action": "delete_selected", "_selected_action": [u.pk for u in users]},
    ).content.decode()
    assert counted(html)["Items"] == 80
    assert counted(html)["Agent runs"] == 6


# A project's own model says that an item may not go, in a process of its own: models
# stay in Django's registry.
PROTECTED = """
import django
django.setup()
from django.contrib.admin.utils import NestedObjects
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connection, models
from agent_sessions import DjangoSession
from agent_sessions.models import SessionItem


class Quote(models.Model):
    item = models.ForeignKey(SessionItem, models.PROTECT, related_name="+")

    class Meta:
        app_label = "auth"


call_command("migrate", verbosity=0)
with connection.schema_editor() as editor:
    editor.create_model(Quote)
alice = get_user_model().objects.create_user("alice")
DjangoSession("room", user=alice).sync.add_items([{"role": "user", "content": "Hi"}])
Quote.objects.create(item=SessionItem.objects.get())
found = NestedObjects(using="default")
found.collect([alice])
print(*(type(each).__name__ for each in found.protected))
"""


def test_what_a_project_protects_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROTECTED],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Quote"]
