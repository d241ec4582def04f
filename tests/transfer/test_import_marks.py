"""What an import knows a source by, and how it leaves the source's folder."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from django.core.management import CommandError

from agent_sessions.models import AgentSession
from tests.support.exports import as_export
from tests.support.import_sources import (
    imported,
    read_sqlite,
    refused,
    run_import,
    write_sqlite,
)

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

ROOT = Path(__file__).parents[2]


def say(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


def texts(session_id: str = "chat") -> list[str]:
    return [item["content"] for item in imported(session_id)]


def write_export(path: Path, *contents: str, session_id: str = "chat") -> None:
    items = [
        {"branch": "main", "position": n, "turn": n, "item": item}
        for n, item in enumerate(say(*contents), 1)
    ]
    line = {
        "format": "agent-sessions/1",
        "session": {"id": session_id, "branch": "main"},
        "branches": [{"name": "main"}],
        "runs": [],
        "items": items,
    }
    path.write_text(as_export(line))


# -- two conversations ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "export"])
@pytest.mark.parametrize(
    "other", [("b1", "b2", "b3", "b4"), ("b1", "b2"), ("a1", "b2", "a3")]
)
def test_another_conversation_at_the_same_place_is_refused(
    tmp_path: Path, kind: str, other: tuple[str, ...]
) -> None:
    path = tmp_path / "source"

    def write(*contents: str) -> None:
        path.unlink(missing_ok=True)
        if kind == "export":
            write_export(path, *contents)
        else:
            write_sqlite(path, "chat", say(*contents))

    write("a1", "a2")
    run_import(kind, path)
    write(*other)
    before = AgentSession.objects.values().get()
    reason = refused(kind, path)
    assert "are others in the source now" in reason
    assert "Delete the imported session and import again" in reason
    assert texts() == ["a1", "a2"]
    assert AgentSession.objects.values().get() == before


def test_the_sessions_beside_it_are_imported(tmp_path: Path) -> None:
    path = tmp_path / "source.db"
    write_sqlite(path, "chat", say("a1", "a2"))
    write_sqlite(path, "room", say("r1"))
    run_import("sqlite", path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE agent_messages SET message_data = ? WHERE id = 1",
            [json.dumps(say("changed")[0])],
        )
    write_sqlite(path, "chat", say("a3"))
    write_sqlite(path, "room", say("r2"))
    assert "chat: refused" in refused("sqlite", path)
    assert texts("chat") == ["a1", "a2"]
    assert texts("room") == ["r1", "r2"]


@pytest.mark.parametrize("kind", ["sqlite", "export"])
def test_what_has_grown_is_known_again(tmp_path: Path, kind: str) -> None:
    path, said = tmp_path / "source", [f"{n} é \x00 \ud800" for n in range(1, 30)]
    for size in (3, 3, 10, 29):
        if kind == "export":
            write_export(path, *said[:size])
        else:
            path.unlink(missing_ok=True)
            write_sqlite(path, "chat", say(*said[:size]))
        run_import(kind, path, "--batch-size", str(size))
        assert texts() == said[:size]


# -- the source's folder -------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_nothing_is_left_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    write_sqlite(path, "chat", say("a1", "a2"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert names(tmp_path) == ["chats.db"]
    before = path.read_bytes()
    run_import("sqlite", path)
    assert texts() == ["a1", "a2"]
    assert names(tmp_path) == ["chats.db"]
    assert path.read_bytes() == before


def test_what_is_in_the_log_alone_is_read(tmp_path: Path) -> None:
    """The server was killed, or a copy was taken while it ran."""
    live, path = tmp_path / "live.db", tmp_path / "copy" / "chats.db"
    path.parent.mkdir()
    write_sqlite(live, "chat", say("a1"))
    with closing(sqlite3.connect(live, isolation_level=None)) as connection:
        connection.execute(
            "INSERT INTO agent_messages (session_id, message_data) VALUES (?, ?)",
            ["chat", json.dumps(say("a2")[0])],
        )
        for end in ("", "-wal"):
            Path(f"{path}{end}").write_bytes(Path(f"{live}{end}").read_bytes())
        # One that is in use is read with its log, and stays as it is.
        run_import("sqlite", live, "--session-id", "chat")
        assert texts() == ["a1", "a2"]
        assert names(tmp_path) == ["copy", "live.db", "live.db-shm", "live.db-wal"]
    AgentSession.objects.all().delete()
    run_import("sqlite", path)
    assert texts() == ["a1", "a2"]
    assert names(path.parent) == ["chats.db", "chats.db-wal"]


READ_ONLY = """
import os, sys
from pathlib import Path
import django
django.setup()
from agent_sessions.transfer.import_.databases import SQLiteFile

if os.geteuid() == 0:
    # Root may write everywhere, so that somebody else has to read.
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
source = SQLiteFile(Path(sys.argv[1]))
print(source.rows("SELECT COUNT(*) FROM agent_messages")[0][0])
source.close()
"""


@pytest.mark.parametrize("mode", [0o555, 0o777])
@pytest.mark.parametrize("hot", [False, True])
def test_a_folder_that_is_read_only_will_do(mode: int, hot: bool) -> None:
    # Not pytest's own folder, which nobody else may enter.
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        source, folder = Path(name) / "source.db", Path(name) / "folder"
        folder.mkdir()
        path = folder / "chats.db"
        write_sqlite(source, "chat", say("a1"))
        with closing(sqlite3.connect(source, isolation_level=None)) as connection:
            if hot:
                connection.execute(
                    "INSERT INTO agent_messages (session_id, message_data) "
                    "VALUES (?, ?)",
                    ["chat", json.dumps(say("a2")[0])],
                )
                Path(f"{path}-wal").write_bytes(Path(f"{source}-wal").read_bytes())
            path.write_bytes(source.read_bytes())
        before = names(folder)
        for each in folder.iterdir():
            each.chmod(0o444)
        folder.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(path)],
            env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        folder.chmod(0o755)
        assert done.stdout.split() == [str(1 + hot)], done.stderr
        assert names(folder) == before


def test_a_file_that_is_written_to_meanwhile_is_read_as_it_was(tmp_path: Path) -> None:
    from agent_sessions.transfer.import_.databases import SQLiteFile

    path = tmp_path / "chats.db"
    write_sqlite(path, "chat", say("a1"))
    source = SQLiteFile(path)
    write_sqlite(path, "chat", say("a2"))
    assert source.rows("SELECT COUNT(*) FROM agent_messages") == [(1,)]
    source.close()
    run_import("sqlite", path)
    assert texts() == read_texts(path)


def read_texts(path: Path) -> list[str]:
    return [item["content"] for item in read_sqlite(path, "chat")]


# -- files of other kinds ------------------------------------------------------------


def failure(kind: str, path: Path, *args: str) -> str:
    with pytest.raises(CommandError) as caught:
        run_import(kind, path, *args)
    assert caught.value.returncode == 1
    assert not AgentSession.objects.exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["sqlite", "advanced-sqlite", "export"])
def test_packed_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "chats"
    write_sqlite(path, "chat", say("a1"))
    packed = gzip.compress(path.read_bytes())
    for content in (packed, b"PK\x03\x04\0" + bytes(range(200))):
        path.write_bytes(content)
        said = failure(kind, path)
        assert "no text in UTF-8" in said or "is no file of SQLite" in said


@pytest.mark.parametrize("kind", ["sqlite", "export"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / "chats.jsonl"
    write_export(path, "a1")
    path.write_bytes(path.read_text().encode(encoding))
    said = failure(kind, path)
    assert "no text in UTF-8" in said or "is no file of SQLite" in said


def test_a_database_in_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA encoding = 'UTF-16le'")
        connection.execute("CREATE TABLE one (two)")
    assert "has its texts in UTF-16" in failure("sqlite", path)


def test_kinds_that_are_mixed_up_are_told(tmp_path: Path) -> None:
    path = tmp_path / "chats"
    write_sqlite(path, "chat", say("a1"))
    assert "is a file of SQLite. Name the KIND" in failure("export", path)
    path.unlink()
    write_export(path, "a1")
    assert "Name the KIND export if it is one" in failure("sqlite", path)
