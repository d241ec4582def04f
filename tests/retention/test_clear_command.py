"""manage.py clear_agent_sessions."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.exceptions import StorageError
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db


class FailingBackend(DatabaseBackend):
    """A store that is down for the sessions called "down"."""

    def clear(self, key: SessionKey) -> int:
        if key.session_id.startswith("down"):
            raise StorageError("The store is down.")
        return super().clear(key)


def make(
    session_id: str, *, items: int = 2, user: Any = None, backend: str = "default"
) -> AgentSession:
    key = SessionKey(session_id, user and user.pk)
    batch = [{"role": "user", "content": f"message {n}"} for n in range(items)]
    sessions[backend].append(key, batch)
    return AgentSession.objects.get(backend=backend, session_id=session_id)


def run(*args: str, **options: Any) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command("clear_agent_sessions", *args, stdout=out, stderr=err, **options)
    return out.getvalue(), err.getvalue()


def counts() -> dict[str, int]:
    return dict(AgentSession.objects.values_list("session_id", "item_count"))


def start_run(row: AgentSession, *, ago: timedelta = timedelta(0)) -> None:
    AgentSession.objects.filter(pk=row.pk).update(
        run_id="run-1",
        run_seen_at=timezone.now() - ago,
        state=AgentSession.State.RUNNING,
    )


def wait_for_approval(row: AgentSession) -> None:
    wait(row, "r")


def left_as_it_is(*args: str) -> str:
    """Run a call that leaves sessions as they are; give what it tells of them."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(CommandError, match="left as") as caught:
        call_command("clear_agent_sessions", *args, stdout=out, stderr=err)
    assert caught.value.returncode == 3
    return err.getvalue()


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return what to answer to questions; afterwards it holds what was asked."""
    texts: list[str] = []
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        if not texts:
            raise EOFError
        return texts.pop()

    monkeypatch.setattr("builtins.input", ask)
    yield texts
    assert questions


def test_clears_the_named_session_and_no_other(alice: Any) -> None:
    make("one", items=3)
    make("two", user=alice)
    assert run("one") == ("Cleared 1 session with 3 items.\n", "")
    assert counts() == {"one": 0, "two": 2}
    assert SessionItem.objects.count() == 2


def test_clears_owned_sessions_without_asking_whose_they_are(alice: Any) -> None:
    make("hers", user=alice)
    run("hers")
    row = AgentSession.objects.get()
    assert (row.item_count, row.user) == (0, alice)


def test_delete_takes_the_session_too(alice: Any) -> None:
    make("one", user=alice)
    assert run("one", "--delete") == ("Deleted 1 session with 2 items.\n", "")
    assert not AgentSession.objects.exists()
    assert not SessionItem.objects.exists()


def test_delete_takes_many_items() -> None:
    make("one", items=2_500)
    assert run("one", "--delete")[0] == "Deleted 1 session with 2500 items.\n"


def test_an_id_named_twice_is_one_session() -> None:
    make("one")
    assert run("one", "one")[0] == "Cleared 1 session with 2 items.\n"


def test_an_empty_session_is_cleared_too() -> None:
    make("one")
    run("one")
    assert run("one")[0] == "Cleared 1 session with 0 items.\n"


def test_unknown_sessions_are_all_named_and_nothing_is_written() -> None:
    make("one")
    with pytest.raises(CommandError) as caught:
        run("one", "nope", "x" * 300, "nul\x00", "\ud800", "--noinput")
    assert caught.value.returncode == 1
    for name in ("'nope'", repr("x" * 300), r"'nul\x00'", r"'\ud800'"):
        assert name in str(caught.value)
    assert "'one'" not in str(caught.value)
    assert counts() == {"one": 2}


def test_case_and_spaces_tell_sessions_apart() -> None:
    make("one")
    for name in ("One", "one ", " one"):
        with pytest.raises(CommandError, match="no such session"):
            run(name)
    assert counts() == {"one": 2}


def test_a_thousand_ids_are_found() -> None:
    names = [f"s{n}" for n in range(1_001)]
    AgentSession.objects.bulk_create(AgentSession(session_id=name) for name in names)
    assert run(*names, "--noinput")[0] == "Cleared 1001 sessions with 0 items.\n"


class TestUser:
    def test_takes_only_that_owners_sessions(self, alice: Any) -> None:
        bob = get_user_model().objects.create_user("bob", password="x")
        make("hers", user=alice)
        make("his", user=bob)
        make("nobodys")
        for name in ("his", "nobodys"):
            with pytest.raises(
                CommandError, match=f"no such session of alice: '{name}'"
            ):
                run("hers", name, "--user", "alice", "--noinput")
        assert counts() == {"hers": 2, "his": 2, "nobodys": 2}
        run("hers", "--user", "alice")
        assert counts() == {"hers": 0, "his": 2, "nobodys": 2}

    @pytest.mark.parametrize("name", ["nobody", ""])
    def test_an_unknown_user_is_an_error(self, name: str) -> None:
        make("one")
        with pytest.raises(CommandError, match=f"There is no user '{name}'"):
            run("one", "--user", name)
        assert counts() == {"one": 2}


class TestBackend:
    def test_an_unknown_alias_is_an_error(self) -> None:
        with pytest.raises(CommandError, match="AGENT_SESSIONS has no alias 'redis'"):
            run("one", "--backend", "redis")

    @override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": DATABASE_BACKEND},
            "other": {"BACKEND": DATABASE_BACKEND},
        }
    )
    def test_takes_the_aliass_own_session(self) -> None:
        make("one")
        make("one", backend="other")
        run("one", "--backend", "other")
        rows = AgentSession.objects.values_list("backend", "item_count")
        assert dict(rows) == {"default": 2, "other": 0}

    @override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": "tests.retention.test_clear_command.FailingBackend"}
        }
    )
    @pytest.mark.parametrize("option", ["--delete", "--noinput"])
    def test_a_store_that_fails_leaves_its_session_and_is_told(
        self, option: str
    ) -> None:
        make("down")
        make("up")
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(CommandError, match="1 session was left as it is") as caught:
            call_command(
                "clear_agent_sessions",
                "down",
                "up",
                "--noinput",
                option,
                stdout=out,
                stderr=err,
            )
        assert caught.value.returncode == 3
        assert err.getvalue() == "down: The store is down.\n"
        assert "1 session with 2 items" in out.getvalue()
        assert counts()["down"] == 2


class TestRuns:
    def test_a_session_with_an_active_run_is_left_out_and_told(self) -> None:
        start_run(make("busy"))
        make("idle")
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(CommandError, match="1 session was left as it is") as caught:
            call_command("clear_agent_sessions", "busy", "idle", stdout=out, stderr=err)
        assert caught.value.returncode == 3
        assert err.getvalue() == "busy: left out, because run run-1 is active.\n"
        assert out.getvalue() == "Cleared 1 session with 2 items.\n"
        assert counts() == {"busy": 2, "idle": 0}

    def test_a_run_that_has_died_holds_nothing(self) -> None:
        start_run(make("one"), ago=timedelta(minutes=2))
        run("one")
        row = AgentSession.objects.get()
        assert (row.item_count, row.run_id, row.state) == (0, "", "idle")

    def test_a_session_that_waits_is_left_out_and_told(self) -> None:
        wait_for_approval(make("one"))
        err = left_as_it_is("one")
        assert err == "one: left out, because it waits for an approval.\n"
        assert counts() == {"one": 2}
        assert AgentRun.objects.get().status == "waiting"

    def test_an_approval_that_nobody_can_give_any_more_holds_nothing(self) -> None:
        wait_for_approval(make("one"))
        AgentRun.objects.update(expires_at=timezone.now())
        run("one")
        assert counts() == {"one": 0}

    def test_an_open_approval_is_withdrawn_if_that_is_wanted(self) -> None:
        wait_for_approval(make("one"))
        run("one", "--waiting")
        assert AgentRun.objects.get().status == "cancelled"
        assert AgentSession.objects.get().state == "idle"


class TestDryRun:
    def test_tells_and_writes_nothing(self) -> None:
        make("one")
        make("two")
        out, _ = run("one", "two", "--dry-run", "--delete")
        assert out == "Would delete 2 sessions with 4 items.\n"
        assert run("one", "two", "--dry-run")[0] == (
            "Would clear 2 sessions with 4 items.\n"
        )
        assert counts() == {"one": 2, "two": 2}

    def test_has_the_exit_code_of_the_real_thing(self) -> None:
        start_run(make("busy"))
        with pytest.raises(CommandError) as caught:
            run("busy", "--dry-run")
        assert caught.value.returncode == 3


class TestAsking:
    @pytest.mark.parametrize("answer", ["y", "Yes", " y "])
    def test_yes_goes_on(self, answers: list[str], answer: str) -> None:
        make("one")
        make("two")
        answers.append(answer)
        run("one", "two")
        assert counts() == {"one": 0, "two": 0}

    @pytest.mark.parametrize("answer", ["n", "", "no", "yy"])
    def test_anything_else_stops(self, answers: list[str], answer: str) -> None:
        make("one")
        make("two")
        answers.append(answer)
        with pytest.raises(CommandError, match="Cancelled; nothing was written"):
            run("one", "two")
        assert counts() == {"one": 2, "two": 2}

    def test_nobody_there_stops_and_names_the_option(self, answers: list[str]) -> None:
        make("one")
        make("two")
        with pytest.raises(CommandError, match="Use --noinput"):
            run("one", "two")
        assert counts() == {"one": 2, "two": 2}

    def test_one_session_is_not_asked_about(self) -> None:
        make("one")
        run("one")
        assert counts() == {"one": 0}

    @pytest.mark.parametrize("option", ["--noinput", "--no-input"])
    def test_noinput_asks_nothing(self, option: str) -> None:
        make("one")
        make("two")
        run("one", "two", option)
        assert counts() == {"one": 0, "two": 0}


def test_verbosity_0_is_silent() -> None:
    make("one")
    assert run("one", verbosity=0) == ("", "")
