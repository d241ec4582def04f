"""manage.py check_agent_sessions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.doctor import restore
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, SessionItem

SECRET = "the patient said"
ORPHAN = {"type": "function_call_output", "call_id": SECRET, "output": SECRET}


def make(session_id: str, *, user: Any = None, backend: str = "default") -> None:
    key = SessionKey(session_id, user and user.pk)
    sessions[backend].append(key, [{"role": "user", "content": SECRET}, ORPHAN])


def run(*args: str, code: int = 0, **options: Any) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    given = {"stdout": out, "stderr": err, **options}
    if not code:
        call_command("check_agent_sessions", *args, **given)
        return out.getvalue(), err.getvalue()
    with pytest.raises(CommandError) as caught:
        call_command("check_agent_sessions", *args, **given)
    assert caught.value.returncode == code
    err.write(str(caught.value))
    return out.getvalue(), err.getvalue()


def quarantined() -> set[str]:
    rows = SessionItem.objects.filter(branch__is_quarantine=True)
    return set(rows.values_list("branch__session__session_id", flat=True))


@pytest.mark.django_db
def test_it_reports_and_writes_nothing_until_told_to_repair() -> None:
    make("s")
    out, err = run(code=1)
    assert out.splitlines() == [
        "s: main #2 orphan_output: The output of a tool has no call before it: models "
        "refuse this history. --repair would move the row into the quarantine.",
        "Examined 1 session with 2 items: 1 finding, 0 repaired, 1 left; 0 sessions "
        "skipped, 0 rows in quarantine.",
    ]
    assert err == "1 finding left. Mend with --repair."
    assert quarantined() == set()
    out, err = run("--repair")
    assert "models refuse this history. Repaired." in out
    assert "1 repaired, 0 left; 0 sessions skipped, 1 row in quarantine." in out
    assert err == ""
    assert quarantined() == {"s"}
    out, _ = run(verbosity=2)
    assert out.splitlines()[0] == "s: main #2: in quarantine"
    assert run(verbosity=0) == ("", "")


@pytest.mark.django_db(transaction=True)
def test_ctrl_c_says_in_one_line_what_is_done() -> None:
    make("s1")
    last = AgentSession.objects.create(pk=777_000_001, session_id="s2")
    make("s2")

    def interrupt(execute: Any, sql: str, params: Any, *rest: Any) -> Any:
        if last.pk in (params or ()):
            raise KeyboardInterrupt
        return execute(sql, params, *rest)

    with connection.execute_wrapper(interrupt):
        _, err = run("--repair", code=130)
    assert err == (
        "Stopped. Examined 1 session: 1 finding, 1 repaired. Run the same command "
        "again for all."
    )
    assert quarantined() == {"s1"}
    assert "Examined 2 sessions" in run("--repair")[0]
    assert quarantined() == {"s1", "s2"}


@pytest.mark.django_db
def test_contents_are_never_printed() -> None:
    make("s")
    SessionItem.objects.filter(position=1).update(data=SECRET, text=SECRET)
    AgentSession.objects.update(title="")
    for args in ((), ("--json",), ("--repair",)):
        out, err = run(*args, code=0 if "--repair" in args else 1, verbosity=2)
        assert SECRET not in out + err
        assert "unreadable_row" in out


@pytest.mark.django_db
def test_json_is_all_that_is_printed() -> None:
    make("s")
    out, _ = run("--json", code=1)
    report = json.loads(out)
    (finding,) = report["findings"]
    pk = AgentSession.objects.get().pk
    assert finding == {
        "code": "orphan_output",
        "session": pk,
        "session_id": "s",
        "branch": "main",
        "position": 2,
        "message": "The output of a tool has no call before it: models refuse this "
        "history.",
        "repair": "move the row into the quarantine",
        "repaired": False,
    }
    assert (report["sessions"], report["items"], report["left"]) == (1, 2, 1)
    report = json.loads(run("--json", "--repair")[0])
    assert report["left"] == 0
    assert report["quarantined"] == [
        {"session": pk, "session_id": "s", "branch": "main", "position": 2}
    ]


@pytest.mark.django_db
def test_sessions_are_chosen_by_id_user_and_backend() -> None:
    alice = get_user_model()._default_manager.create_user("alice")
    two = {name: {"BACKEND": DATABASE_BACKEND} for name in ("default", "other")}
    with override_settings(AGENT_SESSIONS=two):
        make("a1", user=alice)
        make("a2", user=alice)
        make("b", backend="other")
        make("c")
        assert "Examined 1 session" in run("c", code=1)[0]
        assert "Examined 2 sessions" in run("--user", "alice", code=1)[0]
        run("--user", "alice", "a2", "--repair")
        assert quarantined() == {"a2"}
        run("--backend", "other", "--repair")
        assert quarantined() == {"a2", "b"}
        out, _ = run("c", "a1", code=1)
        assert [line.partition(":")[0] for line in out.splitlines()[:2]] == ["c", "a1"]
        run("--repair")
    assert quarantined() == {"a1", "a2", "b", "c"}


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["s", "no", "\x00"], r"no such session: 'no', '\\x00'. Nothing was examined"),
        (["--user", "nobody"], "no user 'nobody'"),
        (["--backend", "nope"], "no alias 'nope'"),
    ],
)
def test_what_is_not_there_is_named(args: list[str], told: str) -> None:
    make("s")
    with pytest.raises(CommandError, match=told) as caught:
        call_command("check_agent_sessions", *args, stdout=io.StringIO())
    assert caught.value.returncode == 2


@pytest.mark.django_db
def test_a_session_whose_backend_is_gone_is_named() -> None:
    make("s")
    AgentSession.objects.update(backend="gone")
    out, err = run(code=1)
    assert out.startswith("s: skipped: AGENT_SESSIONS has no alias 'gone'")
    assert err == "1 session could not be examined."


@pytest.fixture
def private() -> Iterator[None]:
    encrypted = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "default", "keys": [Fernet.generate_key().decode()]},
    }
    outside = {"BACKEND": "tests.support.list_backend.ListBackend"}
    with override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": DATABASE_BACKEND},
            "private": encrypted,
            "outside": outside,
        }
    ):
        yield


@pytest.mark.django_db
@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("alias", "reason"),
    [
        ("private", "'private' encrypts its items, so they can't be examined."),
        ("outside", "'outside' keeps its items in no Django database."),
    ],
)
def test_sessions_that_cannot_be_looked_into_are_named(alias: str, reason: str) -> None:
    make("s", backend=alias)
    for args in ((), ("s",)):
        out, err = run(*args)
        assert out.splitlines() == [
            f"s: skipped: The backend {reason}",
            "Examined 0 sessions with 0 items: 0 findings, 0 repaired, 0 left; "
            "1 session skipped, 0 rows in quarantine.",
        ]
        assert err == ""
    assert run("--backend", alias, code=2) == ("", f"The backend {reason}")
    with pytest.raises(TypeError, match=alias):
        restore(AgentSession.objects.get(), 1)


@pytest.mark.django_db
def test_progress_goes_to_the_error_stream() -> None:
    make("s")
    out, err = run("--batch-size", "1", "--progress", code=1)
    assert "100% 2/2 items" in err
    assert "%" not in out
    assert "%" not in run("--json", code=1)[1]


@pytest.mark.parametrize("size", ["0", "-1", "x"])
def test_a_batch_has_at_least_one_row(size: str) -> None:
    with pytest.raises(CommandError, match="a whole number of 1 or more"):
        run("--batch-size", size)


@pytest.mark.django_db(transaction=True)
def test_exit_codes_are_the_shells(database_environment: dict[str, str]) -> None:
    def shell(*args: str) -> int:
        command = (sys.executable, "-m", "django", "check_agent_sessions", *args)
        return subprocess.run(
            command, env=database_environment, capture_output=True, check=False
        ).returncode

    make("s")
    assert shell("no") == 2
    assert shell() == 1
    assert shell("--repair") == 0
    assert shell() == 0
