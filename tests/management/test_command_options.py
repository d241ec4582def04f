"""Options with what nobody means: they end in an error that says what to do."""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command, get_commands
from django.core.management import load_command_class as load
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.options import parse_age
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.management.options import MOST
from tests.support.import_sources import conversation, write_sqlite
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db(transaction=True)]

DIGITS = "9" * 5_000
NUMBERS = ["-1", "0x10", "1e3", "1_000", "²", "٣", "1.0", " 1", str(2**31), str(2**64)]
NUMBERS += [DIGITS, "0" * 5_000, "", "\0", "\udcff", "nan"]
TEXTS = ["", "\0", "a\0b", "\udcff\udc9b", "\ud800", DIGITS, "-1", str(2**64), "%", "'"]
# What each command needs beside the option that is tried.
NEEDED = {
    "check_agent_sessions": [],
    "clear_agent_sessions": ["--noinput"],
    "copy_agent_sessions": ["--from=default", "--to=lists", "--noinput"],
    "erase_agent_user": ["--noinput"],
    "export_agent_sessions": [],
    "import_agent_sessions": [],
    "list_agent_sessions": [],
    "rotate_agent_session_keys": [],
    "show_agent_session": [],
}


def options() -> list[tuple[str, str, Any]]:
    """Return every option of ours that takes a value, of every command of ours."""
    found = []
    for name, app in sorted(get_commands().items()):
        if app != "agent_sessions":
            continue
        command = load("agent_sessions", name)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)  # type: ignore[arg-type]
        assert name in NEEDED
        for action in parser._actions:
            if action.nargs != 0 and not isinstance(
                action, argparse.BooleanOptionalAction
            ):
                option = (action.option_strings or [""])[0]
                found.append((name, option, action.type))
    return found


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    ListBackend.histories.clear()
    setting: dict[str, Any] = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "lists": {"BACKEND": ListBackend},
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield
    ListBackend.histories.clear()


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = get_user_model()._default_manager.create_user("alice")
    sessions["default"].append(
        SessionKey("s", user.pk), [{"role": "user", "content": "Hello"}]
    )
    monkeypatch.chdir(tmp_path)
    write_sqlite(tmp_path / "source", "t", conversation(1))


def call(name: str, option: str, value: str) -> str:
    """Call a command with one odd option; give the error, if it is one."""
    args = [*NEEDED[name], *([f"{option}={value}"] if option else ["--", value])]
    if name == "show_agent_session" and option:
        args = ["s", *args]
    if name == "erase_agent_user" and option:
        args = ["alice", *args]
    if name == "import_agent_sessions":
        args = [*([] if not option else ["sqlite"]), *args]
        args = [*(["--from", "source"] if option != "--from" else []), *args]
    try:
        call_command(name, *args, stdout=io.StringIO(), stderr=io.StringIO())
    except CommandError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(("name", "option", "kind"), options())
def test_no_value_of_an_option_is_a_traceback(
    name: str, option: str, kind: Any
) -> None:
    for value in dict.fromkeys(itertools.chain(NUMBERS, TEXTS)):
        if option in {"--output", "--receipt"} and value not in {"", "\0", "a\0b"}:
            # Odd, and the name of a file all the same.
            continue
        error = call(name, option, value)
        if kind is not None:
            assert error, value[:20]
        assert error == "" or error.isprintable()
        assert "Traceback" not in error


@pytest.mark.one_database
def test_a_number_has_bounds_that_are_told() -> None:
    for value in NUMBERS:
        error = call("list_agent_sessions", "--limit", value)
        assert "a whole number of 0 or more, up to 2147483647" in error
    assert call("list_agent_sessions", "--limit", str(MOST)) == ""
    assert call("show_agent_session", "--limit", str(MOST)) == ""
    for name, option, _ in options():
        if option == "--batch-size" and name != "rotate_agent_session_keys":
            assert "whole number" not in call(name, option, str(MOST))


@pytest.mark.one_database
def test_an_age_of_thousands_of_digits_is_too_long() -> None:
    with pytest.raises(ValueError, match="longer than time itself"):
        parse_age(f"{DIGITS}d")
    assert "longer than time itself" in call(
        "list_agent_sessions", "--older-than", f"{DIGITS}d"
    )


@pytest.mark.one_database
def test_odd_session_ids_import_nothing_else() -> None:
    for value in ("", "\0", "\udcff", "x" * 256):
        assert "session id" in call("import_agent_sessions", "--session-id", value)
    assert not sessions["default"].latest(SessionKey("t"), None)


@pytest.mark.one_database
def test_an_answer_that_is_no_text_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        sessions["default"].append(
            SessionKey(f"more{number}"), [{"role": "user", "content": "Hello"}]
        )
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with pytest.raises(CommandError, match="Cancelled"):
        call_command("clear_agent_sessions", "--all")
