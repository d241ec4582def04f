"""Columns of ids stay exact, and no schema makes an append fail for an emoji."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.test import Client
from django.urls import reverse
from pytest_django import DjangoDbBlocker

from agent_sessions import DjangoSession, sessions
from agent_sessions import checks as our_checks
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    PendingClear,
    SessionItem,
    SessionSecret,
)
from tests.servers import Server
from tests.settings import DATABASE_KIND

on_mariadb = pytest.mark.skipif(
    DATABASE_KIND != "mariadb", reason="Only MariaDB has character sets of columns."
)
EMOJI = "a 🤖 é"


def found() -> list[tuple[str, str, str]]:
    return [
        (str(message.id).partition(".")[2], message.msg, str(message.hint))
        for message in our_checks.check_databases(databases=["default"])
    ]


def run_hint(hint: str) -> None:
    with connection.cursor() as cursor:
        for statement in re.findall(r"ALTER TABLE [^;]+", hint):
            cursor.execute(statement)


def say(session: DjangoSession, text: str) -> None:
    session.sync.add_items(
        [
            {"role": "user", "content": text},
            {
                "type": "function_call",
                "call_id": f"call {text}",
                "name": f"tool {text}",
                "arguments": "{}",
            },
        ]
    )


@pytest.mark.django_db
def test_the_migrated_columns_are_as_the_fields_ask_for() -> None:
    assert found() == []


@on_mariadb
@pytest.mark.django_db(transaction=True)
class TestConvertedTables:
    """As a hint of the past said: CONVERT TO changes every column of a table."""

    @pytest.fixture(autouse=True)
    def _as_before(self) -> Iterator[None]:
        yield
        while messages := found():
            for _, _, hint in messages:
                run_hint(hint)

    def convert(self, table: str, charset: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET {charset}")

    def test_ids_that_are_no_longer_exact_are_an_error(self) -> None:
        self.convert("agent_sessions_agentsession", "utf8mb4")
        [(code, message, hint)] = found()
        assert code == "E022"
        for column in ("session_id", "backend", "remote_id", "run_id"):
            assert f"agent_sessions_agentsession.{column} (" in message
            assert f"MODIFY {column} varchar" in hint
        assert "title" not in message + hint
        assert "CONVERT" not in hint

    def test_the_hint_makes_them_exact_again(self) -> None:
        self.convert("agent_sessions_agentsession", "utf8mb4")
        [(_, _, hint)] = found()
        run_hint(hint)
        assert found() == []
        say(DjangoSession("ROOM"), "one")
        assert DjangoSession("room").sync.get_items() == []
        say(DjangoSession("room"), "two")
        assert AgentSession.objects.count() == 2

    def test_the_hint_for_texts_leaves_ids_alone(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "ALTER TABLE agent_sessions_agentsession MODIFY title varchar(200) "
                "CHARACTER SET latin1 NOT NULL"
            )
        [(code, message, hint)] = found()
        assert code == "W005"
        assert "latin1" in message
        assert re.findall(r"MODIFY (\w+)", hint) == ["title"]
        run_hint(hint)
        assert found() == []

    @pytest.mark.parametrize("charset", ["utf8mb3", "latin1"])
    def test_an_append_keeps_the_item_and_marks_what_a_column_lacks(
        self, charset: str
    ) -> None:
        for table in ("agent_sessions_agentsession", "agent_sessions_sessionitem"):
            self.convert(table, charset)
        session = DjangoSession("s")
        say(session, EMOJI)
        items: Any = session.sync.get_items()
        assert [item.get("content") for item in items] == [EMOJI, None]
        assert items[1]["name"] == f"tool {EMOJI}"
        message, call = SessionItem.objects.order_by("position")
        assert message.text == "a ? ?"
        assert (call.tool_name, call.call_id) == (
            "tool a ? ?",
            "call a ? ?",
        )
        assert AgentSession.objects.get().title == "a ? ?"

    def test_an_append_of_a_coroutine_too(self) -> None:
        self.convert("agent_sessions_sessionitem", "latin1")
        session = DjangoSession("s")
        async_to_sync(session.add_items)([{"role": "user", "content": EMOJI}] * 3)
        assert len(session.sync.get_items()) == 3

    def test_within_a_transaction_of_the_caller_it_is_stored_once(self) -> None:
        self.convert("agent_sessions_sessionitem", "latin1")
        session = DjangoSession("s")
        with transaction.atomic():
            say(session, "first")
            say(session, EMOJI)
        positions = SessionItem.objects.values_list("position", flat=True)
        assert list(positions.order_by("position")) == [1, 2, 3, 4]


@pytest.fixture
def _unblocked(django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Allow the test to use databases that Django's test cases don't know."""
    with django_db_blocker.unblock():
        yield


@contextmanager
def database_of(server: Server, charset: str, spoken: str) -> Iterator[str]:
    """Make a database of a character set, and migrate it."""
    name = f"of_{charset}_{spoken}"
    settings = {
        "ENGINE": "django.db.backends.mysql",
        "USER": "root",
        "HOST": server.host,
        "PORT": str(server.port),
    }
    connections.settings["maker"] = {**settings, "NAME": "mysql"}
    connections.settings[name] = {
        **settings,
        "NAME": name,
        "OPTIONS": {"charset": spoken},
    }
    connections.settings = connections.configure_settings(connections.settings)
    with connections["maker"].cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} CHARACTER SET {charset}")
    try:
        call_command("migrate", database=name, verbosity=0)
        yield name
    finally:
        sessions.reset()
        with connections["maker"].cursor() as cursor:
            cursor.execute(f"DROP DATABASE {name}")
        for alias in ("maker", name):
            connections[alias].close()
            del connections[alias]
            del connections.settings[alias]


@pytest.mark.usefixtures("_unblocked")
@pytest.mark.parametrize("charset", ["utf8mb3", "latin1"])
class TestSchemas:
    def test_every_text_of_a_narrow_schema_holds_an_emoji(
        self, mariadb_server: Server, charset: str
    ) -> None:
        with database_of(mariadb_server, charset, "utf8mb4") as alias:
            session = DjangoSession("s", database=alias)
            say(session, EMOJI)
            row = AgentSession.objects.using(alias).get()
            assert row.title == EMOJI
            message, call = SessionItem.objects.using(alias).order_by("position")
            assert (message.text, call.tool_name) == (EMOJI, f"tool {EMOJI}")
            AgentRun.objects.using(alias).create(
                session=row, run_id="r", agent_name=EMOJI, model=EMOJI
            )

    def test_a_narrow_connection_stores_items_whole(
        self, mariadb_server: Server, charset: str
    ) -> None:
        with database_of(mariadb_server, charset, charset) as alias:
            session = DjangoSession("s", database=alias)
            say(session, EMOJI)
            items: Any = session.sync.get_items()
            assert items[0]["content"] == EMOJI
            assert SessionItem.objects.using(alias).count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(DATABASE_KIND != "postgres", reason="PostgreSQL's own words.")
def test_a_type_that_folds_case_is_told_on_postgresql() -> None:
    # This build of the server has no collations that fold case.
    alter = "ALTER TABLE agent_sessions_agentsession ALTER COLUMN session_id TYPE"
    with connection.cursor() as cursor:
        cursor.execute("CREATE EXTENSION citext")
        cursor.execute(f"{alter} citext")
        try:
            [(code, message, hint)] = found()
            assert code == "E022"
            assert "agent_sessions_agentsession.session_id (citext)" in message
            run_hint(hint)
            assert found() == []
        finally:
            cursor.execute(f"{alter} varchar(255)")
            cursor.execute("DROP EXTENSION citext")


@pytest.mark.one_database
@pytest.mark.django_db(transaction=True)
def test_a_collation_that_folds_case_is_told_on_sqlite() -> None:
    table = SessionSecret._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"CREATE UNIQUE INDEX folded ON {table} (session_id COLLATE NOCASE)"
        )
        try:
            [(code, message, _)] = found()
        finally:
            cursor.execute("DROP INDEX folded")
    assert code == "E022"
    assert f"{table}.session_id (NOCASE)" in message


@pytest.mark.django_db
def test_owners_of_keys_and_of_pending_clears_are_told_apart() -> None:
    for owner in ("a", "A", "á", "a "):
        SessionSecret.objects.create(
            backend="b", session_id="s", owner=owner, key_id="k", wrapped="w"
        )
        PendingClear.objects.create(backend="b", session_id="s", owner=owner)
    assert SessionSecret.objects.filter(owner="a").count() == 1
    assert PendingClear.objects.filter(owner="A").count() == 1


@on_mariadb
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("charset", ["utf8mb3", "latin1"])
def test_the_admin_finds_ids_on_a_connection_of_fewer_characters(charset: str) -> None:
    say(DjangoSession("room 1"), "one")
    say(DjangoSession("ROOM 2"), "two")
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root"))
    options = connection.settings_dict["OPTIONS"]
    before = options["charset"]
    connection.close()
    options["charset"] = charset
    try:
        response = client.get(
            reverse("admin:agent_sessions_agentsession_changelist"), {"q": "room"}
        )
    finally:
        options["charset"] = before
        connection.close()
    found_ids = [row.session_id for row in response.context["cl"].result_list]
    assert found_ids == ["room 1"]
