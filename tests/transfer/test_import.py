"""manage.py import_agent_sessions: SQLiteSession, owners, conflicts, new items."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from agents.extensions.memory import AsyncSQLiteSession
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import override_settings

from agent_sessions import DjangoSession
from agent_sessions.backends.leases import DatabaseNow
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.support.import_sources import (
    conversation,
    imported,
    read_sqlite,
    run_import,
    write_sqlite,
)

pytestmark = pytest.mark.django_db


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sdk.sqlite3"


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", "alice@example.com", "x")


def change(path: Path, sql: str, *params: Any) -> None:
    with closing(sqlite3.connect(path)) as source, source:
        source.execute(sql, params)


def everything() -> list[Any]:
    """Return every row that an import writes, to see that nothing has changed."""
    tables: tuple[Any, ...] = (AgentSession, Branch, SessionItem)
    return [list(table.objects.order_by("pk").values()) for table in tables]


def test_items_counters_and_times_are_those_of_the_source(path: Path) -> None:
    items = conversation(300, about="How is it?")
    write_sqlite(path, "one", items)
    write_sqlite(path, "two", conversation(1))
    change(path, "UPDATE agent_sessions SET created_at = '2024-01-02 03:04:05'")
    change(path, "UPDATE agent_sessions SET updated_at = '2024-03-02 03:04:05'")
    change(path, "UPDATE agent_messages SET created_at = '2024-02-02 03:04:05'")
    out, err = run_import("sqlite", path)
    assert out.startswith("Imported 1204 items: sessions new 2,")
    assert err == ""
    assert imported("one") == read_sqlite(path, "one") == items
    row = AgentSession.objects.get(session_id="one")
    assert (row.item_count, row.user, row.state) == (1200, None, "idle")
    assert row.title.startswith("How is it? 0 é")
    assert row.created_at == datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert row.updated_at == datetime(2024, 3, 2, 3, 4, 5, tzinfo=UTC)
    assert str(row.active_on) == "2024-03-02"
    branch = row.branch
    assert branch is not None
    assert (branch.name, branch.head, branch.turn) == ("main", 1200, 300)
    rows = list(branch.items.order_by("position"))
    assert [item.position for item in rows] == list(range(1, 1201))
    assert [item.turn for item in rows[::4]] == list(range(1, 301))
    assert {item.created_at for item in rows} == {
        datetime(2024, 2, 2, 3, 4, 5, tzinfo=UTC)
    }
    assert (rows[1].type, rows[1].call_id, rows[1].tool_name) == (
        "function_call",
        "c0",
        "look",
    )
    assert all(item.size == len(item.data) for item in rows)


def test_the_conversation_goes_on_behind_what_was_imported(path: Path) -> None:
    write_sqlite(path, "one", conversation(2))
    run_import("sqlite", path)
    DjangoSession("one").sync.add_items([{"role": "user", "content": "more"}])
    last = SessionItem.objects.latest("position")
    assert (last.position, last.turn) == (9, 3)
    assert len(imported("one")) == 9


def test_a_second_import_writes_nothing_and_a_third_what_is_new(path: Path) -> None:
    write_sqlite(path, "one", conversation(30))
    run_import("sqlite", path)
    before = everything()
    assert "sessions new 0, grown 0, unchanged 1" in run_import("sqlite", path)[0]
    assert everything() == before
    write_sqlite(path, "one", conversation(2, about="later"))
    write_sqlite(path, "new", conversation(1))
    out, _ = run_import("sqlite", path)
    assert "Imported 12 items: sessions new 1, grown 1, unchanged 0" in out
    assert imported("one") == read_sqlite(path, "one")
    row = AgentSession.objects.get(session_id="one")
    assert row.branch is not None
    assert (row.item_count, row.branch.head, row.branch.turn) == (128, 128, 32)


def test_async_sqlite_session(path: Path) -> None:
    items: Any = conversation(3)

    async def write() -> None:
        session = AsyncSQLiteSession("one", path)
        await session.add_items(items)
        await session.close()

    asyncio.run(write())
    run_import("sqlite", path)
    assert imported("one") == items


def test_tables_of_other_names(path: Path) -> None:
    names = {"sessions_table": "my_sessions", "messages_table": "my_messages"}
    write_sqlite(path, "one", conversation(1), **names)
    with pytest.raises(CommandError, match="--sessions-table and --messages-table"):
        run_import("sqlite", path)
    tables = ("--sessions-table", "my_sessions", "--messages-table", "my_messages")
    run_import("sqlite", path, *tables)
    assert imported("one") == conversation(1)


def test_unreadable_rows_are_kept_as_they_are_and_counted(path: Path) -> None:
    write_sqlite(path, "one", conversation(1))
    texts = ['{"cut": ', '["a list"]', "", '{"n": NaN}']
    for text in texts:
        change(
            path, "INSERT INTO agent_messages (session_id, message_data) VALUES (?, ?)",
            "one", text,
        )  # fmt: skip
    change(
        path, "INSERT INTO agent_messages (session_id, message_data) VALUES (?, ?)",
        "one", b"\xff\x00{",
    )  # fmt: skip
    write_sqlite(path, "one", conversation(1, about="after"))
    out, _ = run_import("sqlite", path)
    assert "Unreadable, kept as they are: 5." in out
    rows = list(SessionItem.objects.order_by("position"))
    assert [row.data for row in rows[4:9]] == [*texts, r"\xff\x00{"]
    assert [row.turn for row in rows[3:10]] == [1, 1, 1, 1, 1, 1, 2]
    readable = [item for item in imported("one") if "n" not in item]
    assert readable == conversation(1) + conversation(1, about="after")
    assert AgentSession.objects.get().item_count == 13
    assert "unchanged 1" in run_import("sqlite", path)[0]


def test_messages_whose_session_has_no_row_are_imported(path: Path) -> None:
    write_sqlite(path, "one", conversation(1))
    change(path, "DELETE FROM agent_sessions")
    run_import("sqlite", path)
    assert imported("one") == conversation(1)


def test_a_session_without_items_is_imported(path: Path) -> None:
    write_sqlite(path, "one", conversation(1))
    change(path, "DELETE FROM agent_messages")
    run_import("sqlite", path)
    assert imported("one") == []
    write_sqlite(path, "one", conversation(1))
    run_import("sqlite", path)
    assert imported("one") == conversation(1)


def test_more_sessions_than_a_query_gives(path: Path) -> None:
    write_sqlite(path, "s0", conversation(1))
    with closing(sqlite3.connect(path)) as source, source:
        source.executemany(
            "INSERT INTO agent_sessions (session_id) VALUES (?)",
            [(f"s{n}",) for n in range(1, 1_001)],
        )
    assert "sessions new 1001" in run_import("sqlite", path)[0]


def test_short_sessions_share_their_statements(
    path: Path, django_assert_max_num_queries: Any
) -> None:
    for number in range(20):
        write_sqlite(path, f"s{number}", conversation(2))
    # One asks whether a session is here; MySQL writes each row by itself.
    alone = not connection.features.can_return_rows_from_bulk_insert
    with django_assert_max_num_queries(20 * (3 if alone else 1) + 15):
        run_import("sqlite", path)
    # Its row, its branches, its items.
    with django_assert_max_num_queries(20 * 3 + 10):
        run_import("sqlite", path)
    assert imported("s7") == read_sqlite(path, "s7")


def test_only_the_sessions_named(path: Path) -> None:
    for name in ("one", "two", "three"):
        write_sqlite(path, name, conversation(1))
    run_import("sqlite", path, "--session-id", "one", "--session-id", "three")
    names = set(AgentSession.objects.values_list("session_id", flat=True))
    assert names == {"one", "three"}
    with pytest.raises(CommandError, match="1 session was not imported") as caught:
        run_import("sqlite", path, "--session-id", "nope", "--session-id", "two")
    assert caught.value.returncode == 1
    assert imported("two") == conversation(1)


def test_a_dry_run_counts_and_writes_nothing(path: Path) -> None:
    write_sqlite(path, "one", conversation(5))
    out, _ = run_import("sqlite", path, "--dry-run")
    assert "Would import 20 items: sessions new 1," in out
    assert not AgentSession.objects.exists()
    run_import("sqlite", path)
    write_sqlite(path, "one", conversation(1))
    before = everything()
    assert "Would import 4 items" in run_import("sqlite", path, "--dry-run")[0]
    assert everything() == before


def test_another_backend_is_another_place(path: Path) -> None:
    write_sqlite(path, "one", conversation(1))
    aliases = {name: {"BACKEND": DATABASE_BACKEND} for name in ("default", "archive")}
    with override_settings(AGENT_SESSIONS=aliases):
        run_import("sqlite", path, "--backend", "archive")
    assert AgentSession.objects.get().backend == "archive"


class TestConflicts:
    def refused(self, path: Path, *args: str) -> str:
        """Import, and give why what was refused was refused."""
        reasons = io.StringIO()
        with pytest.raises(CommandError, match="1 session was not") as caught:
            call_command(
                "import_agent_sessions", "sqlite", "--from", str(path), *args,
                stdout=io.StringIO(), stderr=reasons,
            )  # fmt: skip
        assert caught.value.returncode == 1
        return reasons.getvalue()

    def test_a_session_that_was_here_before_is_refused_by_name(
        self, path: Path
    ) -> None:
        mine = [{"role": "user", "content": "mine"}]
        DjangoSession("one").sync.add_items(mine)  # type: ignore[arg-type]
        for name in ("a", "one", "z"):
            write_sqlite(path, name, conversation(2))
        reason = self.refused(path)
        assert "one: refused: " in reason
        assert "wasn't made by an import" in reason
        assert imported("one") == mine
        assert imported("a") == imported("z") == conversation(2)

    def test_an_import_from_elsewhere_is_refused(self, path: Path) -> None:
        other = path.with_name("other.sqlite3")
        write_sqlite(other, "one", conversation(2))
        write_sqlite(path, "one", conversation(3))
        run_import("sqlite", other)
        before = everything()
        assert f"imported from sqlite:{other}" in self.refused(path)
        assert everything() == before

    def test_a_conversation_that_went_on_in_both_places_is_refused(
        self, path: Path
    ) -> None:
        write_sqlite(path, "one", conversation(2))
        run_import("sqlite", path)
        DjangoSession("one").sync.add_items([{"role": "user", "content": "here"}])
        assert "unchanged 1" in run_import("sqlite", path)[0]
        write_sqlite(path, "one", conversation(1, about="there"))
        before = everything()
        assert "has gone on here" in self.refused(path)
        assert everything() == before

    def test_items_removed_from_the_source_are_told(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(2))
        run_import("sqlite", path)
        change(path, "DELETE FROM agent_messages WHERE id = 8")
        write_sqlite(path, "one", conversation(1))
        before = everything()
        assert "are others in the source now" in self.refused(path)
        assert everything() == before

    def test_a_session_in_use_is_refused(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(2))
        run_import("sqlite", path)
        write_sqlite(path, "one", conversation(1))
        AgentSession.objects.update(run_id="run-1", run_seen_at=DatabaseNow())
        assert "a run is going on" in self.refused(path)
        # Its process was killed, and nobody has come back since.
        long_ago = DatabaseNow() - timedelta(minutes=2)
        AgentSession.objects.update(run_seen_at=long_ago)
        assert "grown 1" in run_import("sqlite", path)[0]

    def test_ids_that_cannot_be_kept_are_refused(self, path: Path) -> None:
        write_sqlite(path, "x" * 256, conversation(1))
        assert "1 to 255 characters" in self.refused(path)

    def test_another_owner_is_refused(self, path: Path, alice: Any) -> None:
        write_sqlite(path, "one", conversation(2))
        run_import("sqlite", path)
        assert "another owner" in self.refused(path, "--user", "alice")


def start_and_stop(
    environment: dict[str, str], path: Path, by: signal.Signals
) -> tuple[int, str]:
    """Start an import and end it in the middle; give its exit code and its errors."""
    write_sqlite(path, "before", conversation(2))
    write_sqlite(path, "long", conversation(5_000))
    write_sqlite(path, "with", conversation(2))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "django", "import_agent_sessions", "sqlite"),
            *("--from", str(path), "--batch-size", "500", "--no-progress"),
        ],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while SessionItem.objects.count() < 2_000 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)
    os.kill(process.pid, by)
    return process.wait(), process.communicate()[1]


@pytest.mark.django_db(transaction=True)
def test_ctrl_c_says_in_one_line_how_to_go_on(
    database_environment: dict[str, str], path: Path
) -> None:
    code, said = start_and_stop(database_environment, path, signal.SIGINT)
    assert code == 130
    assert said.count("\n") == 1
    assert said.startswith("CommandError: Stopped. Imported so far: ")
    assert said.endswith("Run the same command again to go on.\n")
    run_import("sqlite", path)
    assert imported("long") == read_sqlite(path, "long")


@pytest.mark.django_db(transaction=True)
def test_a_killed_import_goes_on_and_doubles_nothing(
    database_environment: dict[str, str], path: Path
) -> None:
    code, _ = start_and_stop(database_environment, path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    written = SessionItem.objects.count()
    assert 2_000 <= written < 20_016
    rows = AgentSession.objects.values_list("item_count", flat=True)
    assert sum(rows) == written
    out, _ = run_import("sqlite", path)
    assert f"Imported {20_016 - written} items" in out
    for name in ("before", "long", "with"):
        assert imported(name) == read_sqlite(path, name)
    branch = Branch.objects.get(session__session_id="long")
    positions = branch.items.order_by("position").values_list("position", flat=True)
    assert list(positions) == list(range(1, 20_001))
    assert (branch.head, branch.turn) == (20_000, 5_000)
    assert "unchanged 3" in run_import("sqlite", path)[0]
