"""System checks: what each reports, and what it leaves alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.apps import apps
from django.core import checks
from django.core.management import call_command
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings

from agent_sessions import checks as our_checks
from agent_sessions import sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.checks import check_database
from agent_sessions.handler import DATABASE_BACKEND
from tests.checks.test_handler import WRONG

ROOT = Path(__file__).parents[2]
DATABASE = {"BACKEND": DATABASE_BACKEND}


@pytest.fixture(autouse=True)
def _fresh_handler() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def ids(messages: list[checks.CheckMessage]) -> list[str]:
    return [str(message.id).removeprefix("agent_sessions.") for message in messages]


def run_ids(**kwargs: Any) -> list[str]:
    return [
        i for i in ids(checks.run_checks(**kwargs)) if re.fullmatch(r"[EW]\d{3}", i)
    ]


# -- AGENT_SESSIONS ----------------------------------------------------------------


def test_nothing_is_wrong_without_the_setting() -> None:
    assert our_checks.check_backends() == []


@pytest.mark.parametrize(("setting", "message", "check_id"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_an_error_with_a_hint(
    setting: Any, message: str, check_id: str
) -> None:
    with override_settings(AGENT_SESSIONS=setting):
        found = our_checks.check_backends()
    (error,) = found
    assert isinstance(error, checks.Error)
    assert ids(found) == [check_id]
    assert error.hint
    assert message in f"{error.msg} {error.hint}"


def test_each_alias_has_errors_of_its_own() -> None:
    setting = {"one": {}, "two": {**DATABASE, "OPTIONS": {"thread": 1}}, "three": 3}
    with override_settings(AGENT_SESSIONS=setting):
        assert ids(our_checks.check_backends()) == ["E002", "E003", "E008", "E003"]


def wrapping(inner: Any) -> dict[str, Any]:
    return {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": inner, "keys": [Fernet.generate_key().decode()]},
    }


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"default": DATABASE, "outer": wrapping("default")}, ""),
        (
            {"default": DATABASE, "a": wrapping("b"), "b": wrapping("default")},
            "",
        ),
        (
            {"default": DATABASE, "outer": wrapping("defualt")},
            "Did you mean 'default'?",
        ),
        (
            {"default": wrapping("default")},
            "AGENT_SESSIONS['default'] wraps itself: default > default.",
        ),
    ],
)
def test_inner_backends_are_followed(setting: Any, expected: str) -> None:
    with override_settings(AGENT_SESSIONS=setting):
        found = our_checks.check_backends()
    assert ids(found) == (["E013"] if expected else [])
    assert all(expected in f"{error.msg} {error.hint}" for error in found)


def test_a_broken_inner_backend_is_told_once() -> None:
    setting = {"default": {"BACKEND": "no.Where"}, "outer": wrapping("default")}
    with override_settings(AGENT_SESSIONS=setting):
        assert ids(our_checks.check_backends()) == ["E004"]


def test_a_circle_is_told_for_both_of_its_ends() -> None:
    setting = {"default": wrapping("other"), "other": wrapping("default")}
    with override_settings(AGENT_SESSIONS=setting):
        assert ids(our_checks.check_backends()) == ["E013", "E013"]


# -- databases ---------------------------------------------------------------------


def database_ids(vendor: str, options: dict[str, Any], **more: Any) -> list[str]:
    """Check a backend over a database with the given settings; it need not run."""
    connection = SimpleNamespace(
        vendor=vendor,
        display_name=vendor.title(),
        settings_dict={"NAME": "nowhere.sqlite3", **more, "OPTIONS": options},
        is_in_memory_db=lambda: more.get("NAME") == ":memory:",
    )
    with override_connection(connection):
        return ids(check_database(DatabaseBackend("default", {})))


class override_connection:
    """Put another object in the place of the default connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self.held: BaseDatabaseWrapper = connections["default"]
        connections["default"] = self.connection

    def __exit__(self, *exc: object) -> None:
        connections["default"] = self.held


GOOD_SQLITE = {
    "transaction_mode": "IMMEDIATE",
    "init_command": "PRAGMA journal_mode=WAL;",
    "timeout": 20,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"transaction_mode": "immediate"}, []),
        ({"transaction_mode": "EXCLUSIVE"}, []),
        ({"transaction_mode": None}, ["W001"]),
        ({"transaction_mode": "DEFERRED"}, ["W001"]),
        ({"init_command": "PRAGMA synchronous=1; pragma journal_mode = 'wal'"}, []),
        ({"init_command": "PRAGMA journal_mode=DELETE"}, ["W002"]),
        ({"timeout": 60.5}, []),
        ({"timeout": 5}, ["W003"]),
        ({"timeout": "long"}, ["W003"]),
    ],
)
def test_sqlite(change: dict[str, Any], expected: list[str]) -> None:
    assert database_ids("sqlite", {**GOOD_SQLITE, **change}) == expected


def test_sqlite_as_django_sets_it_up_lacks_all_three() -> None:
    assert database_ids("sqlite", {}) == ["W001", "W002", "W003"]


def test_sqlite_in_memory_is_a_test_database() -> None:
    assert database_ids("sqlite", {}, NAME=":memory:") == []


def test_sqlite_file_that_is_in_wal_mode_needs_no_command(tmp_path: Path) -> None:
    import sqlite3

    name = tmp_path / "db.sqlite3"
    options = {key: GOOD_SQLITE[key] for key in ("transaction_mode", "timeout")}
    connection = sqlite3.connect(name)
    connection.execute("CREATE TABLE t (id)")
    connection.commit()
    assert database_ids("sqlite", options, NAME=name) == ["W002"]
    connection.execute("PRAGMA journal_mode=WAL")
    assert database_ids("sqlite", options, NAME=name) == []
    connection.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, []), ({"charset": "utf8mb4"}, []), ({"charset": "utf8mb3"}, ["W004"])],
)
def test_mysql_charset(options: dict[str, Any], expected: list[str]) -> None:
    assert database_ids("mysql", options) == expected


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (None, []),
        (False, []),
        (True, ["W006"]),
        ({"max_size": 9}, []),
        ({"max_size": 8}, ["W006"]),
        ({"min_size": 9}, []),
        ({"min_size": 2}, ["W006"]),
        ({"max_size": "many"}, []),
    ],
)
def test_psycopg_pool(pool: Any, expected: list[str]) -> None:
    assert database_ids("postgresql", {"pool": pool}) == expected


def test_an_unknown_kind_of_database_is_an_error() -> None:
    assert database_ids("oracle", {}) == ["E015"]


@pytest.mark.django_db
def test_the_test_database_is_fine() -> None:
    assert run_ids(databases=["default"]) == []
    assert our_checks.check_databases(databases=None) == []


@pytest.mark.django_db
def test_only_the_named_databases_are_asked() -> None:
    assert our_checks.check_databases(databases=["elsewhere"]) == []


def test_databases_are_not_asked_where_the_settings_are_wrong() -> None:
    wrong: list[Any] = [[], {"default": {"BACKEND": "no.Where"}}]
    for setting in wrong:
        with override_settings(AGENT_SESSIONS=setting):
            assert our_checks.check_databases(databases=["default"]) == []


# -- the whole ---------------------------------------------------------------------


def test_the_checks_are_registered() -> None:
    assert apps.is_installed("agent_sessions")
    with override_settings(AGENT_SESSIONS=[], CHANNEL_LAYERS={}):
        assert run_ids() == ["E001"]
        with override_settings(ASGI_APPLICATION="mysite.asgi.application"):
            found = run_ids(include_deployment_checks=True)
    assert sorted(found) == ["E001", "W021"]


def test_a_warning_can_be_silenced() -> None:
    with override_settings(
        AGENT_SESSIONS=[], SILENCED_SYSTEM_CHECKS=["agent_sessions.E001"]
    ):
        call_command("check", verbosity=0)


def test_the_table_in_the_docs_has_the_ids_of_the_code() -> None:
    pattern = re.compile(r"agent_sessions\.[EW]\d{3}")
    table = [
        match[0]
        for line in (ROOT / "docs" / "checks.md").read_text().splitlines()
        if line.startswith("| `") and (match := pattern.search(line))
    ]
    code: set[str] = set()
    for source in (ROOT / "agent_sessions").rglob("*.py"):
        code |= set(pattern.findall(source.read_text()))
    assert len(table) == len(set(table))
    assert sorted(table) == sorted(code)


def test_a_plain_check_imports_nothing_heavy() -> None:
    program = (
        "import sys, django\n"
        "django.setup()\n"
        "from django.core.management import call_command\n"
        "call_command('check', verbosity=0)\n"
        "import agent_sessions.admin\n"
        "import agent_sessions.management.commands.clear_agent_sessions\n"
        "heavy = {'agents', 'channels', 'ag_ui', 'redis', 'dapr', 'openai',"
        " 'cryptography'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
