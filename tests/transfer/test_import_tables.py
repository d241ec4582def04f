"""Importing SQLAlchemySession's and openai-django-sessions' tables."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from agents.extensions.memory import SQLAlchemySession
from django.core.management import CommandError
from django.db import connection, models
from sqlalchemy.ext.asyncio import create_async_engine

from agent_sessions.models import AgentSession, SessionItem
from tests.settings import DATABASE_KIND
from tests.support.import_sources import (
    change,
    conversation,
    execute,
    imported,
    read_sqlite,
    refused,
    run_import,
    said,
    write_sqlite,
)

NAMES = {
    "sessions_table": "import_agent_sessions",
    "messages_table": "import_agent_messages",
}
TABLES = (
    *("--sessions-table", NAMES["sessions_table"]),
    *("--messages-table", NAMES["messages_table"]),
)


def write(url: str, session_id: str, *batches: Any, **options: Any) -> list[Any]:
    """Write batches with SQLAlchemySession; give what it reads."""

    async def run() -> list[Any]:
        engine = create_async_engine(url)
        session = SQLAlchemySession(
            session_id, engine=engine, create_tables=True, **options
        )
        for batch in batches:
            await session.add_items(batch)
        items = await session.get_items()
        await engine.dispose()
        return list(items)

    return asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.mark.django_db
def test_sqlalchemy_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "alchemy.sqlite3"
    items = write(
        f"sqlite+aiosqlite:///{path}", "one", conversation(20), conversation(1)
    )
    assert run_import("sqlalchemy", path)[0].startswith("Imported 84 items")
    assert imported("one") == items
    more = write(f"sqlite+aiosqlite:///{path}", "one", conversation(1))
    assert run_import("sqlalchemy", path)[0].startswith("Imported 4 items")
    assert imported("one") == more


@pytest.fixture
def dropped(transactional_db: None) -> Iterator[None]:
    """Drop the source's tables, which no migration knows."""
    yield
    execute(*(f"DROP TABLE {name}" for name in reversed(NAMES.values())))


def alchemy_url() -> str:
    database = connection.settings_dict
    if DATABASE_KIND == "sqlite":
        return f"sqlite+aiosqlite:///{database['NAME']}"
    return (
        f"postgresql+asyncpg://{database['USER']}@{database['HOST']}:"
        f"{database['PORT']}/{database['NAME']}"
    )


@pytest.mark.usefixtures("dropped")
def test_sqlalchemy_in_an_alias() -> None:
    if DATABASE_KIND == "mariadb":
        # There the class can't make its tables: their keys have no length.
        execute(
            f"CREATE TABLE {NAMES['sessions_table']} (session_id varchar(191) PRIMARY "
            "KEY, created_at timestamp NOT NULL DEFAULT '2024-01-02 03:04:05', "
            "updated_at timestamp NOT NULL DEFAULT '2024-01-02 03:04:05')",
            f"CREATE TABLE {NAMES['messages_table']} (id integer AUTO_INCREMENT "
            "PRIMARY KEY, session_id varchar(191) NOT NULL, message_data text NOT "
            "NULL, created_at timestamp NOT NULL DEFAULT '2024-01-02 03:04:05')",
            f"INSERT INTO {NAMES['sessions_table']} (session_id) VALUES ('one')",  # noqa: S608
        )
        items: list[Any] = conversation(30)
        with connection.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {NAMES['messages_table']} (session_id, message_data) "  # noqa: S608
                "VALUES ('one', %s)",
                [[json.dumps(item)] for item in items],
            )
    else:
        items = write(alchemy_url(), "one", conversation(30), **NAMES)
    assert run_import("sqlalchemy", "default", *TABLES)[0].startswith("Imported 120")
    assert imported("one") == items
    row = AgentSession.objects.get()
    first = SessionItem.objects.earliest("position")
    assert row.created_at <= first.created_at <= row.updated_at
    assert "unchanged 1" in run_import("sqlalchemy", "default", *TABLES)[0]


@pytest.mark.usefixtures("dropped")
def test_openai_django_sessions() -> None:
    class Session(models.Model):
        """The table as that package's model makes it."""

        session_id = models.CharField(max_length=255, unique=True)
        created_at = models.DateTimeField()
        updated_at = models.DateTimeField()

        class Meta:
            app_label = "import_sessions"
            db_table = NAMES["sessions_table"]

        def __str__(self) -> str:
            return str(self.session_id)

    class Message(models.Model):
        """The table as that package's model makes it."""

        session = models.ForeignKey(Session, models.CASCADE)
        data = models.JSONField()
        created_at = models.DateTimeField()

        class Meta:
            app_label = "import_sessions"
            db_table = NAMES["messages_table"]

        def __str__(self) -> str:
            return str(self.pk)

    sessions: Any = Session
    messages: Any = Message
    with connection.schema_editor() as editor:
        editor.create_model(Session)
        editor.create_model(Message)
    now = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    earlier = now.replace(year=2023)
    sources = {
        name: sessions.objects.create(session_id=name, created_at=now, updated_at=now)
        for name in ("one", "two")
    }
    # jsonb has neither NUL nor lone surrogates.
    items = [item for item in conversation(3) if "role" not in item]
    items.append({"role": "user", "content": "é 😀"})
    for name, session in sources.items():
        messages.objects.bulk_create(
            Message(session=session, data={**item, "of": name}, created_at=now)
            for item in items
        )
    # Read by time first, as that package does.
    messages.objects.create(session=sources["one"], data={"n": 0}, created_at=earlier)
    out, _ = run_import("openai-django", "default", *TABLES)
    assert out.startswith(f"Imported {2 * len(items) + 1} items: sessions new 2,")
    assert imported("two") == [{**item, "of": "two"} for item in items]
    assert imported("one") == [{"n": 0}, *({**item, "of": "one"} for item in items)]
    row = AgentSession.objects.get(session_id="two")
    assert row.created_at == row.updated_at == now
    assert "unchanged 2" in run_import("openai-django", "default", *TABLES)[0]
    messages.objects.create(session=sources["two"], data={"n": 1}, created_at=now)
    run_import("openai-django", "default", *TABLES, "--session-id", "two")
    assert imported("two")[-1] == {"n": 1}


@pytest.mark.django_db(transaction=True)
def test_an_alias_without_the_tables_is_told() -> None:
    with pytest.raises(CommandError, match="See that it has the tables"):
        run_import("sqlalchemy", "default", *TABLES)
    assert not AgentSession.objects.exists()


@pytest.mark.django_db
class TestSQLite:
    def test_an_id_that_is_no_utf_8_is_refused(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        garbled = "INSERT INTO agent_sessions (session_id) VALUES (CAST(? AS TEXT))"
        change(path, garbled, b"\xff")
        change(
            path,
            "INSERT INTO agent_messages (session_id, message_data) "
            "VALUES (CAST(? AS TEXT), '{}')",
            b"\xfe",
        )
        reasons = refused("sqlite", path)
        assert reasons.count("\ufffd: refused: A session id can't hold") == 2
        assert imported("one") == read_sqlite(path, "one")

    def test_garbled_ids_end_no_page(self, path: Path) -> None:
        write_sqlite(path, "s0", conversation(1))
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.executemany(
                "INSERT INTO agent_sessions (session_id) VALUES (CAST(? AS TEXT))",
                [(b"\xf0%03d" % n,) for n in range(600)],
            )
        assert refused("sqlite", path).count("A session id can't hold") == 600
        assert imported("s0") == conversation(1)

    def test_times_that_are_no_utf_8_are_none(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        for table in ("agent_sessions", "agent_messages"):
            change(path, f"UPDATE {table} SET created_at = CAST(? AS TEXT)", b"\xff")  # noqa: S608
        run_import("sqlite", path)
        assert imported("one") == conversation(1)

    def test_a_row_without_an_id_hides_no_other_session(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        change(path, "DELETE FROM agent_sessions")
        change(path, "INSERT INTO agent_sessions (session_id) VALUES (NULL)")
        assert "None: refused: " in refused("sqlite", path, "--user-from", "{username}")
        refused("sqlite", path)
        assert imported("one") == conversation(1)


@pytest.mark.django_db
class TestWrongKind:
    def make(self, path: Path) -> None:
        """Make the tables of openai-django-sessions."""
        change(
            path,
            "CREATE TABLE agent_sessions (id integer PRIMARY KEY, session_id varchar, "
            "created_at datetime, updated_at datetime)",
        )
        change(
            path,
            "CREATE TABLE agent_messages (id integer PRIMARY KEY, session_id integer, "
            "data text, created_at datetime)",
        )
        change(path, "INSERT INTO agent_sessions (session_id) VALUES ('one')")
        change(
            path,
            "INSERT INTO agent_messages (session_id, data) "
            """VALUES (1, '{"role": "user", "content": "q"}')""",
        )

    @pytest.mark.parametrize("kind", ["sqlite", "sqlalchemy"])
    def test_it_is_told_before_anything_is_written(self, path: Path, kind: str) -> None:
        self.make(path)
        with pytest.raises(CommandError) as caught:
            run_import(kind, path)
        assert '"agent_messages".message_data' in str(caught.value)
        assert "those of openai-django: name that KIND" in str(caught.value)
        assert not AgentSession.objects.exists()
        run_import("openai-django", path)
        assert imported("one") == said("q")

    def test_and_the_other_way_round(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        with pytest.raises(CommandError, match="those of sqlite or sqlalchemy"):
            run_import("openai-django", path)

    def test_tables_of_no_kind(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        change(path, "ALTER TABLE agent_messages RENAME COLUMN message_data TO other")
        with pytest.raises(CommandError, match="See that the KIND"):
            run_import("sqlite", path)
