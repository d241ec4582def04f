"""Imports of what is too long, too deep or too much: time and memory have bounds."""

from __future__ import annotations

import io
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from agent_sessions.models import AgentSession, SessionItem
from agent_sessions.transfer.import_ import export_file
from tests.support import import_sources
from tests.support.exports import as_export
from tests.support.import_sources import run_import

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

MEGABYTE = 1024 * 1024
SESSIONS = (
    "CREATE TABLE agent_sessions (session_id TEXT PRIMARY KEY, created_at TEXT, "
    "updated_at TEXT)"
)
MESSAGES = (
    "CREATE TABLE agent_messages (id INTEGER PRIMARY KEY, session_id TEXT, "
    "message_data TEXT, created_at TEXT)"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source"


def write(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def refused(kind: str, place: Any, *args: str) -> str:
    """Import what is refused, and see that nothing of it is kept."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command(
            "import_agent_sessions",
            kind,
            "--from",
            str(place),
            *args,
            stdout=out,
            stderr=err,
        )
    assert not AgentSession.objects.exists()
    assert not SessionItem.objects.exists()
    return err.getvalue() + str(caught.value)


def line(**changes: Any) -> str:
    session = {
        "format": "agent-sessions/1",
        "session": {"id": "s"},
        "branches": [],
        "runs": [],
        "items": [],
    }
    return as_export(session | changes)


HEAD = line().partition("\n")[0] + "\n"


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


class TestExports:
    @pytest.mark.parametrize("depth", [150, 900, 980, 100_000, 3_000_000])
    def test_nesting_is_no_bomb(self, path: Path, depth: int) -> None:
        metadata = '{"x": ' + nested(depth) + "}"
        path.write_text(line(session={"id": "s", "metadata": 0}).replace("0", metadata))
        refused("export", path)

    @pytest.mark.parametrize("depth", [150, 900, 980, 100_000, 3_000_000])
    def test_nested_items_are_kept_whole_or_not(self, path: Path, depth: int) -> None:
        item = {"branch": "main", "position": 1, "turn": 1, "item": {"x": 0}}
        path.write_text(line(items=[item]).replace('"x": 0', f'"x": {nested(depth)}'))
        try:
            run_import("export", path)
        except CommandError:
            assert not SessionItem.objects.exists()
        else:
            (data,) = SessionItem.objects.values_list("data", flat=True)
            assert nested(depth) in data

    def test_a_chain_of_branches_needs_no_stack(self, path: Path) -> None:
        branches: list[Any] = [{"name": "main"}]
        for number in range(1_100):
            before = branches[-1]["name"]
            branch = {"name": f"b{number}", "parent": before, "fork_position": 0}
            branches.append(branch)
        path.write_text(line(branches=branches))
        assert "branches 1101" in run_import("export", path)[0]

    def test_thousands_of_branches_are_refused(self, path: Path) -> None:
        path.write_text(line(branches=[{"name": str(n)} for n in range(5_000)]))
        assert "more than 2,000 branches" in refused("export", path)

    def test_numbers_of_thousands_of_digits_are_refused(self, path: Path) -> None:
        for digits in (20, 4_000, 5_000, 100_000):
            number = "9" * digits
            path.write_text(
                line(session={"id": "s", "requests": 0}).replace("0", number)
            )
            refused("export", path)

    def test_the_limit_that_is_passed_is_told(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export_file, "ITEM_BYTES", 2_000)
        path.write_text(line(session={"id": "s", "title": "x" * 2_000}))
        assert "line 1 has more than 2,000 bytes" in refused("export", path)
        item = {"branch": "main", "position": 1, "turn": 1, "item": {"x": "y" * 3_000}}
        path.write_text(line(branches=[{"name": "main"}], items=[item]))
        told = import_sources.refused("export", path)
        assert "line 2 has an item of more than 2,000 bytes" in told


LIMITED = """
import resource, sys
import django
from django.core.management import execute_from_command_line
django.setup()
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)
execute_from_command_line(["manage.py", "import_agent_sessions", *sys.argv[1:]])
"""


def one_line(text: str, size: int = 800) -> Callable[[Any], None]:
    def make(file: Any) -> None:
        file.write(text)
        file.flush()
        os.truncate(file.fileno(), size * MEGABYTE)

    return make


def pieces(text: str, piece: str, size: int) -> Callable[[Any], None]:
    def make(file: Any) -> None:
        file.write(text)
        for _ in range(size * MEGABYTE // (len(piece) * 1_000)):
            file.write(piece * 1_000)

    return make


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "make",
    [
        one_line('"', 2_000),
        one_line('{"format": "'),
        one_line(HEAD + '{"branch": "main", "item": {"content": "'),
        pieces('{"format": [', "[],", 100),
        pieces("", '{"format": [', 100),
        pieces("{", '"aaaa": [[], [], []],', 100),
        pieces(HEAD, '{"branch":"main","x":[]},', 100),
        pieces(HEAD, '{"branch":"main","x":[]}\n', 100),
        pieces("", " ", 500),
        pieces("", "x\n", 1),
    ],
    ids=[
        "text",
        "header",
        "item",
        "lists",
        "nested",
        "keys",
        "item of items",
        "items",
        "blanks",
        "lines",
    ],
)
def test_a_long_file_takes_bounded_memory(
    path: Path, make: Callable[[Any], None], database_environment: dict[str, str]
) -> None:
    with path.open("w") as file:
        make(file)
    ended = limited(database_environment, "export", str(path), "--no-progress")
    assert ended.returncode in {0, 1}, ended.stderr[-2_000:]
    assert b"Traceback" not in ended.stderr
    assert not SessionItem.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_long_cells_take_bounded_memory(
    path: Path, database_environment: dict[str, str]
) -> None:
    write(
        path,
        SESSIONS,
        MESSAGES,
        "INSERT INTO agent_sessions VALUES ('s', '', '')",
        *["INSERT INTO agent_messages VALUES (NULL, 's', zeroblob(30000000), '')"] * 10,
        "INSERT INTO agent_messages VALUES (NULL, 's', zeroblob(300000000), '')",
    )
    ended = limited(database_environment, "sqlite", str(path))
    assert ended.returncode == 1
    assert b"one of its messages has more than" in ended.stderr
    assert b"Traceback" not in ended.stderr


def limited(environment: dict[str, str], kind: str, *args: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, kind, "--from", *args],
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
