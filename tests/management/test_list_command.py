"""manage.py list_agent_sessions and show_agent_session."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.management.printing import table
from agent_sessions.models import AgentSession, SessionItem
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

HOSTILE = "\x1b[2J\u202e\x9b"


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


def make(
    session_id: str,
    *texts: str,
    user: Any = None,
    backend: str = "default",
    idle: int = 0,
    **columns: Any,
) -> AgentSession:
    key = SessionKey(session_id, user and user.pk)
    items = [{"role": "user", "content": text} for text in texts or ("Hello",)]
    sessions[backend].append(key, items)
    rows = AgentSession.objects.filter(backend=backend, session_id=session_id)
    used = timezone.now() - timedelta(days=idle)
    rows.update(updated_at=used, active_on=used.date(), **columns)
    return rows.get()


def run(command: str, *args: str, **options: Any) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command(command, *args, stdout=out, stderr=err, **options)
    return out.getvalue(), err.getvalue()


def fails(command: str, *args: str) -> str:
    with pytest.raises(CommandError) as caught:
        run(command, *args)
    assert caught.value.returncode == 1
    return str(caught.value)


def listed(*args: str) -> list[str]:
    return [
        row["id"] for row in json.loads(run("list_agent_sessions", "--json", *args)[0])
    ]


class TestList:
    def test_a_table_of_everything_but_what_was_said(self) -> None:
        alice = get_user_model()._default_manager.create_user("alice")
        make("old", "a secret", idle=3)
        make("new", "one", "two", user=alice, backend="lists", input_tokens=1234)
        lines = run("list_agent_sessions")[0].splitlines()
        assert [line.split()[:7] for line in lines] == [
            ["session", "user", "backend", "items", "tokens", "in", "out"],
            ["new", "alice", "lists", "2", "1234", "0", "idle"],
            ["old", "-", "default", "1", "0", "0", "idle"],
        ]
        assert "secret" not in "".join(lines)
        assert "a secret" in run("list_agent_sessions", "--titles")[0]

    def test_json_is_a_list_of_objects(self) -> None:
        row = make("one", "a secret", idle=1)
        out, _ = run("list_agent_sessions", "--json")
        assert json.loads(out) == [
            {
                "id": "one",
                "backend": "default",
                "user": None,
                "items": 1,
                "input_tokens": 0,
                "output_tokens": 0,
                "state": "idle",
                "updated_at": row.updated_at.isoformat(),
                "created_at": row.created_at.isoformat(),
                "expires_at": None,
            }
        ]
        assert "a secret" in run("list_agent_sessions", "--json", "--titles")[0]

    def test_the_options_choose_as_everywhere(self) -> None:
        alice = get_user_model()._default_manager.create_user("alice")
        make("hers", user=alice)
        make("idle", idle=9)
        make("waits", state="waiting")
        make("listed", backend="lists")
        assert listed("--user", "alice") == ["hers"]
        assert set(listed("--unowned")) == {"idle", "waits", "listed"}
        assert listed("--older-than", "1w") == ["idle"]
        assert listed("--state", "waiting") == ["waits"]
        assert listed("--backend", "lists") == ["listed"]
        assert listed("waits", "hers") == ["waits", "hers"]
        assert listed("--older-than", "2w") == []

    def test_more_than_the_limit_are_told_of(self) -> None:
        for number in range(3):
            make(f"s{number}", idle=number)
        out, err = run("list_agent_sessions", "--limit", "2", "--json")
        assert [row["id"] for row in json.loads(out)] == ["s0", "s1"]
        assert err == "There are more than 2; --limit 0 lists all.\n"
        assert len(listed("--limit", "0")) == len(listed("--limit", "3")) == 3

    def test_nothing_there_is_said(self) -> None:
        assert run("list_agent_sessions")[0] == "There are no such sessions.\n"
        assert listed() == []

    def test_what_isn_t_there_is_an_error(self) -> None:
        assert fails("list_agent_sessions", "x").startswith(
            "There is no such session: 'x'"
        )
        assert "no alias 'x'" in fails("list_agent_sessions", "--backend", "x")
        assert fails("list_agent_sessions", "--user", "x") == "There is no user 'x'."
        assert "whole number of 0" in fails("list_agent_sessions", "--limit", "-1")

    def test_a_terminal_obeys_no_id_and_no_title(self) -> None:
        make(HOSTILE, HOSTILE)
        out = run("list_agent_sessions", "--titles")[0]
        assert not set(HOSTILE) & set(out) - set("[2J")

    def test_a_long_table_keeps_the_widths_of_its_beginning(self) -> None:
        rows = [("a", "b")] * 98 + [("longer", "b")] * 151
        lines = list(table(("x", "y"), rows))
        assert len(lines) == 250
        assert (lines[1], lines[249]) == ("a       b", "longer  b")
        assert list(table(("x", "y"), [("longer", "b")])) == ["x       y", "longer  b"]


class TestShow:
    def test_a_transcript_that_people_read(self) -> None:
        make("one", "What is the time?")
        sessions["default"].append(
            SessionKey("one"), [{"role": "assistant", "content": "Half past nine."}]
        )
        out, _ = run("show_agent_session", "one")
        assert out.startswith("# `one`\n")
        assert "- Backend: `default`" in out
        assert out.index("What is the time?") < out.index("Half past nine.")

    @pytest.mark.parametrize("backend", ["default", "lists"])
    def test_the_last_items_of_any_store(self, backend: str) -> None:
        make("one", *(f"text {n}" for n in range(500)), backend=backend)
        out, _ = run("show_agent_session", "one", "--json")
        found = json.loads(out)
        assert found["session"]["id"] == "one"
        assert found["session"]["backend"] == backend
        contents = [each["item"]["content"] for each in found["items"]]
        assert contents == [f"text {n}" for n in range(400, 500)]
        for limit, count in (("1", 1), ("450", 450), ("0", 500), ("900", 500)):
            out, _ = run("show_agent_session", "one", "--json", "--limit", limit)
            assert len(json.loads(out)["items"]) == count

    def test_an_empty_session(self) -> None:
        make("one")
        sessions["default"].clear(SessionKey("one"))
        assert json.loads(run("show_agent_session", "one", "--json")[0])["items"] == []
        assert run("show_agent_session", "one")[0].startswith("# `one`\n")
        assert run("show_agent_session", "one", "--limit", "0")[0]

    def test_an_unreadable_row_is_shown_as_it_is(self) -> None:
        make("one")
        SessionItem.objects.update(data="{broken")
        found = json.loads(run("show_agent_session", "one", "--json")[0])
        assert found["items"][0]["raw"] == "{broken"
        assert "Unreadable item" in run("show_agent_session", "one")[0]

    def test_another_branch(self) -> None:
        make("one", "first", "second")
        DjangoSession("one").sync.create_branch_from_turn(2, "side")
        assert "second" not in run("show_agent_session", "one")[0]
        assert "second" in run("show_agent_session", "one", "--branch", "main")[0]
        assert "Branch 'x' does not exist" in fails(
            "show_agent_session", "one", "--branch", "x"
        )
        make("two", backend="lists")
        assert "keeps no branches" in fails(
            "show_agent_session", "two", "--branch", "x"
        )

    def test_one_id_in_two_stores(self) -> None:
        make("one", "here")
        make("one", "there", backend="lists")
        assert "default, lists" in fails("show_agent_session", "one")
        assert "there" in run("show_agent_session", "one", "--backend", "lists")[0]

    def test_what_isn_t_there_is_an_error(self) -> None:
        assert "There is no such session: 'x'" in fails("show_agent_session", "x")

    def test_a_terminal_obeys_nothing_that_was_said(self) -> None:
        make("one", HOSTILE, title=HOSTILE)
        out = run("show_agent_session", "one")[0]
        assert not {"\x1b", "\x9b"} & set(out)
