"""The options of manage.py import_agent_sessions: owners, zones, the bar."""

from __future__ import annotations

import io
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError
from django.utils import translation

from agent_sessions.management.printing import Progress
from agent_sessions.models import AgentSession
from agent_sessions.transfer.import_ import open_source
from tests.support.exports import as_export
from tests.support.import_sources import (
    conversation,
    imported,
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
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, params)


class TestOwners:
    def owners(self) -> dict[str, Any]:
        rows = AgentSession.objects.values_list("session_id", "user__username")
        return dict(rows)

    def test_one_user_for_all(self, path: Path, alice: Any) -> None:
        write_sqlite(path, "one", conversation(1))
        run_import("sqlite", path, "--user", "alice")
        assert self.owners() == {"one": "alice"}
        assert imported("one", user=alice) == conversation(1)

    @pytest.mark.parametrize(
        ("rule", "session_id"),
        [
            ("user:", "user:alice"),
            ("user:", "user:alice:chat/1"),
            ("user_{username}", "user_alice"),
            ("*/{email}/*", "chat/alice@example.com/1"),
            ("u{pk}:*", "u%d:1"),
        ],
    )
    def test_the_id_tells(
        self, path: Path, alice: Any, rule: str, session_id: str
    ) -> None:
        session_id = session_id.replace("%d", str(alice.pk))
        write_sqlite(path, session_id, conversation(1))
        run_import("sqlite", path, "--user-from", rule)
        assert self.owners() == {session_id: "alice"}

    def test_who_cannot_be_told_is_refused(self, path: Path, alice: Any) -> None:
        for name in ("user:alice", "user:bob", "other"):
            write_sqlite(path, name, conversation(1))
        with pytest.raises(CommandError, match="2 sessions were not imported"):
            run_import("sqlite", path, "--user-from", "user:")
        assert self.owners() == {"user:alice": "alice"}

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--user", "nobody"), "no user whose username is 'nobody'"),
            (("--user-from", "{pk}{email}"), "takes one of"),
        ],
    )
    def test_wrong_options_are_told_before_anything_is_read(
        self, path: Path, args: tuple[str, ...], message: str
    ) -> None:
        write_sqlite(path, "one", conversation(1))
        with pytest.raises(CommandError, match=message):
            run_import("sqlite", path, *args)


class TestOptions:
    def test_a_place_that_is_nothing(self) -> None:
        with pytest.raises(CommandError, match="neither an alias of DATABASES"):
            run_import("sqlite", "nowhere.sqlite3")

    def test_a_file_that_is_no_database(self, path: Path) -> None:
        path.write_text("not a database, but longer than its header would be" * 9)
        with pytest.raises(CommandError, match="not a database"):
            run_import("sqlite", path)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--timezone", "Mars/Olympus"), "no zone"),
            (("--batch-size", "0"), "1 or more"),
            (("--backend", "nope"), "no alias 'nope'"),
        ],
    )
    def test_values_that_cannot_be(
        self, path: Path, args: tuple[str, ...], message: str
    ) -> None:
        write_sqlite(path, "one", conversation(1))
        with pytest.raises(CommandError, match=message):
            run_import("sqlite", path, *args)

    def test_a_zone_for_times_that_name_none(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(1))
        change(path, "UPDATE agent_sessions SET created_at = '2024-07-02 12:00:00'")
        run_import("sqlite", path, "--timezone", "Europe/Berlin")
        row = AgentSession.objects.get()
        assert row.created_at == datetime(2024, 7, 2, 10, tzinfo=UTC)

    def test_the_bar_is_shown_when_asked_for_and_only_then(self, path: Path) -> None:
        write_sqlite(path, "one", conversation(5))
        _, err = run_import("sqlite", path, "--progress", "--dry-run")
        assert "100% 20/20 items" in err
        assert run_import("sqlite", path, "--no-progress")[1] == ""

    def test_the_bar_of_a_file_tells_what_is_left(self, path: Path) -> None:
        items = [
            {"branch": "main", "position": n, "turn": 1, "item": {"content": "x" * 400}}
            for n in range(1, 5_001)
        ]
        line = {
            "format": "agent-sessions/1",
            "session": {"id": "one"},
            "branches": [{"name": "main"}],
            "runs": [],
            "items": items,
        }
        path.write_text(as_export(line))
        source = open_source("export", str(path))
        try:
            session = next(source.sessions())
            pages = source.items(session, session.branches[0])
            done = sum(len(next(pages)) for _ in range(4))
            assert 4_000 < source.total(done) < 6_000
            assert sum(map(len, pages)) == 5_000 - done
            assert source.total(5_000) == 5_000
        finally:
            source.close()
        _, err = run_import("export", path, "--progress")
        assert "100% 5,000/5,000 items" in err
        assert run_import("export", path, "--verbosity", "0") == ("", "")

    def test_the_bar_tells_what_is_left(self) -> None:
        stream = io.StringIO()
        bar = Progress(stream, 1_000)
        time.sleep(0.01)
        bar.add(500)
        assert (
            "\r[############------------]  50% 500/1,000 items, " in stream.getvalue()
        )
        assert " left" in stream.getvalue()


def test_the_report_is_in_one_language(path: Path) -> None:
    write_sqlite(path, "one", conversation(1))
    with translation.override("ja"):
        assert run_import("sqlite", path)[0].startswith("Imported 4 items: sessions")
