"""Commands and pages read from where they write, whatever routers say of reading."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import Client, override_settings
from django.urls import reverse
from django.utils import timezone
from pytest_django import DjangoDbBlocker

from agent_sessions import checks as our_checks
from agent_sessions import get_session, sessions
from agent_sessions.admin.overview import gather
from agent_sessions.doctor import examine, restore
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentRun, AgentSession, PendingClear, SessionItem
from tests.support.admin_pages import LIST, page, url
from tests.support.exports import read_export

OVERVIEW = "admin:agent_sessions_agentsession_overview"
RUN = "admin:agent_sessions_agentrun_change"
SETTINGS = {
    "SESSION_ENGINE": "django.contrib.sessions.backends.signed_cookies",
    "AGENT_SESSIONS": {"default": {"BACKEND": DATABASE_BACKEND}},
}


class Lagging:
    """Read from a replica that has nothing yet, as Django's own example does."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "primary"

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        return True


class OnePlace(Lagging):
    """Read and write in one database."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "primary"


@pytest.fixture(scope="module")
def _empty(
    django_db_blocker: DjangoDbBlocker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Migrate a database, to be copied for each test."""
    path = tmp_path_factory.mktemp("several") / "empty.sqlite3"
    with django_db_blocker.unblock():
        add("empty", path)
        call_command("migrate", database="empty", verbosity=0)
        remove("empty")
    return path


@pytest.fixture(autouse=True)
def _databases(
    _empty: Path, django_db_blocker: DjangoDbBlocker, tmp_path: Path
) -> Iterator[None]:
    aliases = ("primary", "replica", "agents")
    with django_db_blocker.unblock():
        for alias in aliases:
            add(alias, Path(shutil.copy(_empty, tmp_path / alias)))
        yield
        sessions.reset()
        for alias in aliases:
            remove(alias)


@pytest.fixture
def _lagging(_databases: None) -> Iterator[None]:
    with override_settings(DATABASE_ROUTERS=[Lagging()], **SETTINGS):
        yield
        # Nothing of ours has got there.
        assert not AgentSession.objects.using("replica").exists()


def add(alias: str, path: Path) -> None:
    connections.settings[alias] = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(path),
        "OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 20},
    }
    connections.settings = connections.configure_settings(connections.settings)


def remove(alias: str) -> None:
    connections[alias].close()
    del connections[alias]
    del connections.settings[alias]


def staff() -> Client:
    """Log in somebody whom the replica knows already."""
    users = get_user_model()._default_manager
    user = users.db_manager("primary").create_superuser("staff", password="x")
    user.save(using="replica", force_insert=True)
    client = Client()
    client.force_login(user)
    return client


def make_owner(name: str = "ann") -> Any:
    return get_user_model()._default_manager.db_manager("primary").create_user(name)


def converse(name: str = "chat", user: Any = None) -> AgentSession:
    """Make a session with a fork and a run."""
    session: Any = get_session(name, user=user).sync
    session.add_items([{"role": "user", "content": "first question"}])
    session.add_items([{"role": "user", "content": "second question"}])
    session.create_branch_from_turn(2, "fork")
    session.add_items([{"role": "user", "content": "third question"}])
    row = AgentSession.objects.using("primary").get(session_id=name)
    AgentRun.objects.using("primary").create(
        session=row, branch_id=row.branch_id, run_id="run", status="completed"
    )
    return row


def run(command: str, *args: str, **options: Any) -> str:
    out = io.StringIO()
    call_command(command, *args, stdout=out, stderr=io.StringIO(), **options)
    return out.getvalue()


@pytest.mark.usefixtures("_lagging")
class TestALaggingReplica:
    def test_export_import_and_erase(self, tmp_path: Path) -> None:
        ann = make_owner()
        converse(user=ann)
        file = tmp_path / "all.jsonl"
        run("export_agent_sessions", output=str(file))
        (found,) = read_export(file.read_text())
        assert (found["session"]["branch"], found["session"]["user"]) == ("fork", "ann")
        assert [each["parent"] for each in found["branches"]] == [None, "main"]
        assert found["runs"][0]["branch"] == "fork"
        receipt = json.loads(run("erase_agent_user", "ann", interactive=False))
        assert (receipt["complete"], receipt["sessions"]) == (True, 1)
        run("import_agent_sessions", "export", "--from", str(file))
        row = AgentSession.objects.using("primary").get()
        assert (row.item_count, row.user_id) == (3, ann.pk)

    def test_export_as_markdown(self, tmp_path: Path) -> None:
        converse(user=make_owner())
        target = tmp_path / "out.md"
        run("export_agent_sessions", format="markdown", output=str(target))
        assert "third question" in target.read_text()

    def test_list_and_show(self) -> None:
        converse(user=make_owner())
        [listed] = json.loads(run("list_agent_sessions", user="ann", json=True))
        assert (listed["id"], listed["user"]) == ("chat", "ann")
        assert "third question" in run("show_agent_session", "chat")
        shown = json.loads(run("show_agent_session", "chat", json=True))
        assert shown["session"]["branch"] == "fork"

    def test_check_and_clear(self) -> None:
        converse(user=make_owner())
        assert examine().sessions == 1
        assert examine(AgentSession.objects.all()).sessions == 1
        report = json.loads(run("check_agent_sessions", json=True, user="ann"))
        assert report["findings"] == []
        run("clear_agent_sessions", "chat", interactive=False)
        assert not SessionItem.objects.using("primary").exists()
        run("clear_agent_sessions", "chat", delete=True, interactive=False)
        assert not AgentSession.objects.using("primary").exists()

    def test_copy(self) -> None:
        converse(user=make_owner())
        aliases = {
            "default": {"BACKEND": DATABASE_BACKEND},
            "second": {"BACKEND": DATABASE_BACKEND},
        }
        with override_settings(AGENT_SESSIONS=aliases):
            run("copy_agent_sessions", "--all", "--from", "default", "--to", "second")
            there = AgentSession.objects.using("primary").get(backend="second")
        assert there.item_count == 2

    def test_the_pages_of_the_admin(self) -> None:
        client = staff()
        row = converse(user=make_owner())
        listed = page(client, reverse(LIST))
        assert "first question" in listed
        assert "ann" in listed
        shown = page(client, url("change", row))
        assert "third question" in shown
        assert "ann" in shown
        assert gather(7).total.sessions == 1
        assert "chat" in page(client, f"{reverse(LIST)}?q=ann")
        page(client, reverse(OVERVIEW))
        runs = reverse("admin:agent_sessions_agentrun_changelist")
        assert "chat" in page(client, runs)
        [made] = AgentRun.objects.using("primary").all()
        assert "chat" in page(client, reverse(RUN, args=(made.pk,)))

    @pytest.mark.parametrize("form", ["json", "markdown"])
    def test_the_export_of_the_admin(self, form: str) -> None:
        client = staff()
        row = converse(user=make_owner())
        response: Any = client.post(url("export", row, form))
        text = b"".join(response).decode()
        assert "third question" in text
        assert "ann" in text

    def test_the_clearing_and_deleting_of_the_admin(self) -> None:
        client = staff()
        row = converse(user=make_owner())
        response = client.post(url("clear", row), {"post": "yes", "count": "1"})
        assert response.status_code == 302
        assert not SessionItem.objects.using("primary").exists()
        client.post(url("delete", row), {"post": "yes"})
        assert not AgentSession.objects.using("primary").exists()

    def test_a_row_is_read_again_from_where_it_lies(self) -> None:
        row = converse()
        AgentSession.objects.using("primary").update(fence=7)
        row.refresh_from_db()
        assert row.fence == 7
        deferred = AgentSession.objects.using("primary").defer("metadata").get()
        assert deferred.metadata == {}


@pytest.fixture
def _elsewhere(_databases: None) -> Iterator[None]:
    aliases = {
        "default": {"BACKEND": DATABASE_BACKEND, "OPTIONS": {"database": "agents"}}
    }
    settings = SETTINGS | {"AGENT_SESSIONS": aliases}
    with override_settings(DATABASE_ROUTERS=[OnePlace()], **settings):
        yield


@pytest.mark.usefixtures("_elsewhere")
class TestAnotherDatabaseThanTheUsers:
    def test_a_check_says_that_no_session_can_have_an_owner(self) -> None:
        found = our_checks.check_backends()
        [message] = [each for each in found if each.id == "agent_sessions.W008"]
        assert "'agents'" in message.msg
        assert "'primary'" in message.msg

    def test_the_check_is_silent_where_the_database_is_the_same(self) -> None:
        connections.settings["agents"]["NAME"] = connections.settings["primary"]["NAME"]
        remove_connection("agents")
        ids = [each.id for each in our_checks.check_backends()]
        assert "agent_sessions.W008" not in ids

    def test_the_admin_reads_where_the_rows_are(self) -> None:
        client = staff()
        get_session("chat").sync.add_items([{"role": "user", "content": "hello you"}])
        row = AgentSession.objects.using("agents").get()
        assert "hello you" in page(client, reverse(LIST))
        assert "hello you" in page(client, url("change", row))
        assert gather(7).total.sessions == 1
        response = client.post(url("delete", row), {"post": "yes"})
        assert response.status_code == 302
        assert not AgentSession.objects.using("agents").exists()

    def test_the_doctor_finds_them_too(self) -> None:
        get_session("chat").sync.add_items([{"role": "user", "content": "hello"}])
        assert examine().sessions == 1


def remove_connection(alias: str) -> None:
    connections[alias].close()
    del connections[alias]


def left_behind(row: AgentSession) -> AgentSession:
    """Make the row that is still where a session's tables were copied from."""
    old = timezone.now() - timedelta(days=60)
    return AgentSession.objects.using("default").create(
        pk=row.pk, session_id=row.session_id, updated_at=old, active_on=old.date()
    )


def moved(backend: str, **options: Any) -> Any:
    options["database"] = "agents"
    aliases = {"default": {"BACKEND": backend, "OPTIONS": options}}
    return override_settings(AGENT_SESSIONS=aliases)


@pytest.mark.django_db(databases="__all__")
@pytest.mark.parametrize("how", [("--delete",), (), ("--dry-run",)])
def test_a_clear_of_what_a_move_has_left_behind_touches_no_other_database(
    how: tuple[str, ...],
) -> None:
    with moved(DATABASE_BACKEND):
        session: Any = get_session("chat").sync
        session.add_items([{"role": "user", "content": "one"}])
        left_behind(AgentSession.objects.using("agents").get())
        err = io.StringIO()
        with pytest.raises(CommandError):
            call_command(
                "clear_agent_sessions",
                *("--older-than", "30d", "--no-input", *how),
                stdout=io.StringIO(),
                stderr=err,
            )
        assert "in the database 'agents'" in err.getvalue()
        assert len(session.get_items()) == 1


@pytest.mark.django_db(databases="__all__")
def test_the_doctor_looks_at_no_session_of_another_database() -> None:
    with moved(DATABASE_BACKEND):
        get_session("other").sync.add_items([{"role": "user", "content": "one"}])
        SessionItem.objects.using("agents").update(data="torn")
        row = AgentSession.objects.using("agents").get()
        row.session_id = "left"
        report = examine([left_behind(row)], repair=True)
        assert (report.sessions, report.findings, report.is_clean) == (0, [], False)
        assert "in the database 'agents'" in report.skipped[0].reason
        assert examine().quarantined == []
        with pytest.raises(AgentSessionError, match="in the database 'agents'"):
            restore(AgentSession.objects.using("default").get(), 1)
        for command in ("show_agent_session", "export_agent_sessions"):
            with pytest.raises(CommandError):
                run(command, "left")


@pytest.mark.django_db(databases="__all__")
def test_who_deletes_it_removes_nothing_from_the_store() -> None:
    with moved("agent_sessions.backends.redis.RedisBackend", url="redis://[::1]:1/0"):
        row = left_behind(AgentSession(pk=1, session_id="chat"))
        row.delete()
        assert not PendingClear.objects.using("default").exists()
