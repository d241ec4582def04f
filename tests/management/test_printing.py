"""Every command prints by the one table of characters, whatever it says."""

from __future__ import annotations

import ast
import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core import checks
from django.core.management import CommandError, call_command, get_commands
from django.core.management import load_command_class as load
from django.test import override_settings
from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.backends.remote.test_pending import FailingBackend
from tests.encryption.test_encryption import NEW
from tests.items.test_characters import HOSTILE, READABLE, leaks
from tests.support.exports import as_export
from tests.support.import_sources import write_sqlite

pytestmark = pytest.mark.one_database

# -- commands --------------------------------------------------------------------------


@pytest.fixture
def stores() -> Iterator[None]:
    FailingBackend.down = False
    FailingBackend.histories.clear()
    encrypted = "agent_sessions.backends.encrypted.EncryptedBackend"
    setting: dict[str, Any] = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "lists": {"BACKEND": FailingBackend},
        "private": {
            "BACKEND": encrypted,
            "OPTIONS": {"backend": "default", "keys": [NEW]},
        },
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield
    FailingBackend.down = False
    FailingBackend.histories.clear()


def make(session_id: str = f"id{HOSTILE}", *, user: Any = None, **columns: Any) -> Any:
    text = f"said{HOSTILE}\ud800\x00\n\tnext"
    tool = f"tool{HOSTILE}\ud800"
    batch = [
        {"role": "user", "content": text},
        {"type": "function_call", "call_id": tool, "name": tool, "arguments": text},
        {"type": "function_call_output", "call_id": tool, "output": text},
        {"type": "function_call_output", "call_id": f"lost{tool}", "output": text},
        {"type": tool, "status": tool, "id": tool},
    ]
    sessions["default"].append(SessionKey(session_id, user and user.pk), batch)
    rows = AgentSession.objects.filter(session_id=session_id)
    rows.update(**{"title": f"title{HOSTILE}", **columns})
    return rows.get()


class Called:
    """What a command printed: bytes of both streams, and the error that ended it."""

    def __init__(self, command: str, *args: str, **options: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        self.error = ""
        try:
            call_command(command, *args, stdout=out, stderr=err, **options)
        except CommandError as exc:
            self.error = str(exc)
            cause = exc.__cause__
            self.error += "" if cause is None else str(cause)
        self.out, self.err = out.getvalue(), err.getvalue()


def call_list() -> Iterator[Called]:
    make(user=someone())
    yield Called("list_agent_sessions", "--titles")
    yield Called("list_agent_sessions", "--titles", "--json")
    yield Called("list_agent_sessions", "--user", HOSTILE)
    yield Called("list_agent_sessions", "--backend", HOSTILE)
    yield Called("list_agent_sessions", "--state", HOSTILE)
    yield Called("list_agent_sessions", "--older-than", HOSTILE)
    yield Called("list_agent_sessions", HOSTILE)


def call_show() -> Iterator[Called]:
    row = make(user=someone())
    yield Called("show_agent_session", row.session_id)
    yield Called("show_agent_session", row.session_id, "--json")
    yield Called("show_agent_session", row.session_id, "--branch", HOSTILE)
    yield Called("show_agent_session", HOSTILE)


def call_clear() -> Iterator[Called]:
    now = timezone.now()
    make("busy" + HOSTILE, run_id=f"run{HOSTILE}", run_seen_at=now)
    make("gone" + HOSTILE, backend=f"x{HOSTILE}")
    make()
    yield Called("clear_agent_sessions", "--all", "--dry-run")
    yield Called("clear_agent_sessions", "--all", "--noinput")
    yield Called("clear_agent_sessions", "--all", "--keep-last-turns", "1", "--noinput")
    yield Called("clear_agent_sessions", HOSTILE, "--noinput")


def call_check() -> Iterator[Called]:
    row = make()
    Branch.objects.filter(session=row).update(name=f"b{HOSTILE}")
    make("busy" + HOSTILE, run_id=f"run{HOSTILE}", run_seen_at=timezone.now())
    yield Called("check_agent_sessions", verbosity=2)
    yield Called("check_agent_sessions", "--json")
    yield Called("check_agent_sessions", "--repair", verbosity=2)
    yield Called("check_agent_sessions", HOSTILE)
    yield Called("check_agent_sessions", "--backend", HOSTILE)
    yield Called("check_agent_sessions", "--user", HOSTILE)


def call_rotate() -> Iterator[Called]:
    key = SessionKey(f"id{HOSTILE}")
    sessions["private"].append(key, [{"role": "user", "content": "x"}])
    item = SessionItem.objects.get()
    envelope = json.loads(item.data) | {"kid": f"key{HOSTILE}\ud800"}
    SessionItem.objects.update(data=json.dumps(envelope))
    yield Called("rotate_agent_session_keys")
    yield Called("rotate_agent_session_keys", "--backend", HOSTILE)


def call_copy() -> Iterator[Called]:
    row = make()
    Branch.objects.create(session=row, name=f"other{HOSTILE}")
    yield Called("copy_agent_sessions", "--from=default", "--to=lists", "--all")
    FailingBackend.down = True
    make("new" + HOSTILE)
    yield Called("copy_agent_sessions", "--from=default", "--to=lists", "--all")
    yield Called("copy_agent_sessions", f"--from={HOSTILE}", "--to=lists", "--all")
    yield Called("copy_agent_sessions", "--from=default", "--to=lists", HOSTILE)


def call_import(folder: Path) -> Iterator[Called]:
    path = folder / f"x{HOSTILE.replace('/', '')}.db"
    write_sqlite(path, f"id{HOSTILE}", [{"role": "user", "content": HOSTILE}])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO agent_sessions (session_id) VALUES (x'1b9b')")
        connection.execute(
            "INSERT INTO agent_sessions (session_id) VALUES (?)", [HOSTILE * 20]
        )
    command, source = "import_agent_sessions", ("sqlite", "--from", str(path))
    yield Called(command, *source, "--user-from", f"{HOSTILE}:*")
    yield Called(command, *source, "--user", HOSTILE)
    yield Called(command, *source, "--sessions-table", HOSTILE)
    yield Called(command, *source, "--timezone", HOSTILE)
    yield Called(command, *source, "--session-id", HOSTILE)
    yield Called(command, *source)
    yield Called(command, "sqlite", "--from", HOSTILE)
    export = folder / "export.jsonl"
    session = {"id": f"id{HOSTILE}", "user": HOSTILE, "backend": HOSTILE}
    line = {
        "format": "agent-sessions/1",
        "session": session,
        "branches": [{"name": f"a~{HOSTILE}"}],
        "runs": [],
        "items": [],
    }
    export.write_text(f"{HOSTILE}\n{as_export(line, line)}")
    yield Called(command, "export", "--from", str(export))
    yield Called(command, "export", "--from", str(folder / HOSTILE.replace("/", "")))


def call_erase() -> Iterator[Called]:
    person = someone()
    FailingBackend.down = False
    make(user=person)
    make("busy" + HOSTILE, user=person, run_id=HOSTILE, run_seen_at=timezone.now())
    yield Called("erase_agent_user", person.username, "--noinput")
    yield Called("erase_agent_user", HOSTILE, "--noinput")


def call_export(folder: Path) -> Iterator[Called]:
    row = make(user=someone())
    make("gone" + HOSTILE, backend=f"x{HOSTILE}")
    yield Called("export_agent_sessions", row.session_id)
    yield Called("export_agent_sessions", "--format", "markdown")
    there = folder / f"x{HOSTILE.replace('/', '')}"
    there.touch()
    yield Called("export_agent_sessions", "--output", str(there))


def someone() -> Any:
    users = get_user_model()._default_manager
    return users.create_user(f"name{HOSTILE}")


CALLS: dict[str, Callable[..., Iterator[Called]]] = {
    "check_agent_sessions": call_check,
    "clear_agent_sessions": call_clear,
    "copy_agent_sessions": call_copy,
    "erase_agent_user": call_erase,
    "export_agent_sessions": call_export,
    "import_agent_sessions": call_import,
    "list_agent_sessions": call_list,
    "rotate_agent_session_keys": call_rotate,
    "show_agent_session": call_show,
}
# Those that print contents, whose lines and tabs stay.
CONTENTS = {"show_agent_session", "export_agent_sessions"}


def commands() -> list[str]:
    return [name for name, app in get_commands().items() if app == "agent_sessions"]


def test_every_command_prints_by_the_table() -> None:
    assert sorted(commands()) == sorted(CALLS)
    for name in commands():
        assert isinstance(load("agent_sessions", name), PrintingCommand)


def test_no_command_goes_around_its_streams() -> None:
    folder = Path(sys.modules[PrintingCommand.__module__].__file__ or "").parent
    for path in folder.glob("commands/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        touched = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        imported = {
            a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
        }
        assert not called & {"print", "open"}, path
        assert not touched & {"_out", "BaseCommand"}, path
        assert "sys" not in imported, path


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("name", CALLS)
def test_no_command_prints_what_a_terminal_obeys(name: str, tmp_path: Path) -> None:
    kept = "\n\t" if name in CONTENTS else "\n"
    takes_folder = CALLS[name].__code__.co_argcount
    called = list(CALLS[name](*[tmp_path] * takes_folder))
    assert any(call.out + call.err for call in called)
    for call in called:
        assert not leaks(call.out + call.err, kept)
        assert not leaks(call.error)
        # No line begins with what a stored text says.
        for line in (call.err if name in CONTENTS else call.out + call.err).split("\n"):
            assert not line.startswith("\u202e")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("stores")
def test_a_line_of_a_report_is_one_line() -> None:
    make("one\nForged: all is well", run_id="r", run_seen_at=timezone.now())
    call = Called("clear_agent_sessions", "--all", "--noinput")
    assert call.err.startswith("one␊Forged: all is well: left out")
    out = Called("list_agent_sessions").out
    assert len(out.splitlines()) == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("stores")
def test_contents_keep_their_lines_tabs_and_emoji() -> None:
    sessions["default"].append(
        SessionKey("s"), [{"role": "user", "content": f"a\n\tb {READABLE[-1]}"}]
    )
    assert f"\na\n\tb {READABLE[-1]}\n" in Called("show_agent_session", "s").out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colour", [True, False])
def test_the_colours_of_a_terminal_are_django_s_own(colour: bool) -> None:
    class Command(PrintingCommand):
        def handle(self, *args: Any, **options: Any) -> None:
            self.stderr.write("\x1b[31mred")
            self.stdout.write("\x1b[31mred", self.style.SUCCESS)

    err, out = Terminal(), Terminal()
    command = Command(stdout=out, stderr=err, force_color=colour, no_color=not colour)
    command.handle()
    assert err.getvalue().count("␛[31mred") == 1
    assert err.getvalue().startswith("\x1b[") is colour
    assert out.getvalue().startswith("\x1b[") is colour


def test_what_the_encoding_of_a_terminal_lacks_is_spelled() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    PrintingCommand(stdout=out).stdout.write("é…")
    out.flush()
    assert raw.getvalue() == b"\\xe9\\u2026\n"


@pytest.mark.django_db
def test_system_checks_quote_what_is_printed() -> None:
    setting = {f"x{HOSTILE}": {"BACKEND": f"no.{HOSTILE}", "OPTIONS": {HOSTILE: 1}}}
    with override_settings(
        AGENT_SESSIONS=setting, ASGI_APPLICATION=f"a{HOSTILE}.b", CHANNEL_LAYERS={}
    ):
        found = checks.run_checks(include_deployment_checks=True)
        call = Called("list_agent_sessions", skip_checks=False)
    ours = [each for each in found if (each.id or "").startswith("agent_sessions.")]
    assert ours
    assert not any(leaks(f"{each.msg}{each.hint}") for each in ours)
    assert "System check identified some issues:\n\nERRORS:\n" in call.error
    assert not leaks(call.error, "\n\t")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "args",
    [
        ["list_agent_sessions", f"--limt{HOSTILE}"],
        ["list_agent_sessions", "--limit", HOSTILE],
        ["export_agent_sessions", "--output", f"/nowhere{HOSTILE}/x"],
        ["import_agent_sessions", "sqlite", "--from", HOSTILE, "--traceback"],
        ["import_agent_sessions", HOSTILE, "--from", "x"],
        ["show_agent_session", HOSTILE, "--traceback"],
        ["erase_agent_user", b"\xff\x9b31m".decode("utf-8", "surrogateescape")],
    ],
)
def test_the_shell_s_arguments_are_printed_by_the_table(
    args: list[str], database_environment: dict[str, str]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "django", *map(os.fsencode, args)],
        env=database_environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode in {1, 2}
    assert not leaks((ended.stdout + ended.stderr).decode(), "\n")
