"""Every command on a database that isn't migrated, or isn't there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError

from agent_sessions import DjangoSession
from agent_sessions.management import printing
from agent_sessions.management.commands import clear_agent_sessions
from agent_sessions.transfer.export import FORMAT
from tests.support.exports import as_export

pytestmark = pytest.mark.one_database

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "agent_sessions/management/commands").glob("[a-z]*.py")
)
# Arguments with which each has something to do, and its code for nothing done.
CALLS: dict[str, list[tuple[list[str], int]]] = {
    "check_agent_sessions": [([], 2), (["chat", "--user", "alice"], 2)],
    "clear_agent_sessions": [
        (["--all", "--noinput"], 1),
        (["chat"], 1),
        (["--expired", "--dry-run"], 1),
    ],
    "copy_agent_sessions": [(["--from=default", "--to=other", "--all"], 1)],
    "erase_agent_user": [(["alice", "--noinput"], 2)],
    "export_agent_sessions": [([], 1), (["--format=markdown", "chat"], 1)],
    "import_agent_sessions": [(["export", "--from=EXPORT"], 1)],
    "list_agent_sessions": [([], 1), (["--user", "alice"], 1), (["--json"], 1)],
    "rotate_agent_session_keys": [([], 1)],
    "show_agent_session": [(["chat"], 1)],
}

SCRIPT = """
import io, json, sys
from django.conf import settings

calls, database, before = json.loads(sys.argv[1])
settings.DATABASES["default"] |= database
backend = "agent_sessions.backends.database.DatabaseBackend"
settings.AGENT_SESSIONS = {
    "default": {"BACKEND": backend},
    "other": {"BACKEND": backend},
    "private": {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "default", "keys": ["k" * 32]},
    },
}
import django

django.setup()
from django.core.management import CommandError, call_command

for each in before:
    call_command("migrate", *each, verbosity=0)
for command, arguments in calls:
    try:
        call_command(command, *arguments, stdout=io.StringIO(), stderr=io.StringIO())
    except CommandError as exc:
        print(json.dumps([exc.returncode, str(exc)]))
    except BaseException as exc:
        print(json.dumps([None, repr(exc)]))
    else:
        print(json.dumps([0, ""]))
"""


def answers(
    tmp_path: Path, database: dict[str, Any], before: Any = ()
) -> list[tuple[str, int, int, str]]:
    """Call every command; give its name, the code expected, its own and its words."""
    file = tmp_path / "export.jsonl"
    session = {"id": "chat", "branch": "main"}
    line = {"format": FORMAT, "session": session, "branches": [], "runs": []}
    file.write_text(as_export(line | {"items": []}))
    calls = [(name, *each) for name, some in CALLS.items() for each in some]
    given = [
        (name, [str(file).join(each.split("EXPORT")) for each in arguments])
        for name, arguments, _ in calls
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([given, database, list(before)])],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        (name, code, *each) for (name, _, code), each in zip(calls, said, strict=True)
    ]


def test_no_command_is_left_out() -> None:
    assert sorted(CALLS) == [name for name in COMMANDS if name != "__init__"]


def test_a_database_without_tables_is_to_be_migrated(tmp_path: Path) -> None:
    for name, code, own, said in answers(tmp_path, {"NAME": ":memory:"}):
        assert (name, own) == (name, code), said
        assert said.startswith("The database 'default' is not migrated: "), (name, said)
        assert said.endswith("Run manage.py migrate first."), (name, said)


def test_a_database_that_lacks_the_last_migrations_gives_no_traceback(
    tmp_path: Path,
) -> None:
    before = [["auth"], ["admin"], ["agent_sessions", "0001"]]
    for name, _, own, said in answers(tmp_path, {"NAME": ":memory:"}, before):
        assert own is not None, (name, said)


@pytest.mark.django_db
def test_what_was_written_before_is_not_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another database lacks a migration, after one was written to."""

    def fail(**options: Any) -> int:
        raise OperationalError

    DjangoSession("chat").sync.add_items([{"role": "user", "content": "Hi"}])
    monkeypatch.setattr(clear_agent_sessions, "finish_removals", fail)
    monkeypatch.setattr(printing, "_find_unmigrated", lambda: "It is not migrated.")
    with pytest.raises(CommandError, match="not migrated") as caught:
        call_command("clear_agent_sessions", "--all", "--noinput", stdout=io.StringIO())
    assert caught.value.returncode == 3
    assert DjangoSession("chat").sync.get_items() == []


def test_a_database_that_is_not_there_is_told(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing" / "db.sqlite3")
    for name, _, own, said in answers(tmp_path, {"NAME": missing}):
        assert own, (name, said)
        assert "The database" in said, (name, said)
        assert "OperationalError" in said, (name, said)
        assert missing not in said
