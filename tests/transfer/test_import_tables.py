"""Importing SQLAlchemySession's tables, and what SQLite's may hold."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents.extensions.memory import SQLAlchemySession
from django.core.management import CommandError
from django.db import connection
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
    def test_tables_of_no_kind(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        change(path, "ALTER TABLE agent_messages RENAME COLUMN message_data TO other")
        with pytest.raises(CommandError, match="See that the KIND"):
            run_import("sqlite", path)
