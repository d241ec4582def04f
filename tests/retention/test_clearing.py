"""What clearing does where somebody else was faster, or a store is down."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.exceptions import StorageError
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.retention import (
    Removal,
    Selection,
    Spared,
    finish_removals,
    remove,
    store_of,
    unfinished_items,
)
from tests.backends.remote.test_pending import FailingBackend
from tests.support.selections import AskedSelection
from tests.support.trimming import count_trimmed, trim

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    FailingBackend.down = False
    FailingBackend.histories.clear()
    setting: dict[str, Any] = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "lists": {"BACKEND": FailingBackend},
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield
    FailingBackend.histories.clear()


def make(session_id: str, items: int = 5, backend: str = "default") -> AgentSession:
    batch = [{"role": "user", "content": f"message {n}"} for n in range(items)]
    sessions[backend].append(SessionKey(session_id), batch)
    return AgentSession.objects.get(backend=backend, session_id=session_id)


def run(*args: str, code: int = 0) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    if not code:
        call_command("clear_agent_sessions", *args, stdout=out, stderr=err)
    else:
        with pytest.raises(CommandError) as caught:
            call_command("clear_agent_sessions", *args, stdout=out, stderr=err)
        assert caught.value.returncode == code
    return out.getvalue(), err.getvalue()


def test_a_store_that_was_down_is_asked_again_by_the_command() -> None:
    make("away", backend="lists")
    FailingBackend.down = True
    with transaction.atomic():
        AgentSession.objects.get().delete()
    _, err = run(code=3)
    assert err == (
        "lists: what 1 deleted session held is still there (StoreUnavailable).\n"
    )
    FailingBackend.down = False
    assert run("--all")[0].startswith("Removed 5 items of 1 session deleted earlier.\n")
    assert not any(FailingBackend.histories.values())


def test_a_session_that_another_process_removed_is_none() -> None:
    for backend in ("default", "lists"):
        row = make("gone", backend=backend)
        row.delete()
        assert remove(row, Removal()) is None


def test_other_stores_tell_that_they_can_t_remove_turns() -> None:
    row = make("listed", backend="lists")
    with pytest.raises(Spared, match="FailingBackend can't remove single turns"):
        trim(row, 1)
    with pytest.raises(Spared, match="can't remove single turns"):
        count_trimmed(row, 1)
    for dry in ((), ("--dry-run",)):
        _, err = run("listed", "--keep-last-turns", "1", *dry, code=3)
        assert err == (
            "listed: left out, because FailingBackend can't remove single turns.\n"
        )


def test_totals_count_named_sessions_too() -> None:
    make("one", 3)
    make("two", 4)
    totals = Selection(("one", "nope")).totals()
    assert (totals.sessions, totals.items) == (1, 3)


def test_rows_of_named_sessions_come_in_their_order() -> None:
    make("one")
    make("two")
    rows = Selection(("two", "one")).rows()
    assert [row.session_id for row in rows] == ["two", "one"]


def test_an_item_that_came_late_goes_with_its_branch() -> None:
    row = make("long", 9)
    remove(row, Removal(batch_size=2))
    removed = AgentSession._base_manager.get(removed_at__isnull=False)
    branch = Branch._base_manager.get(session=removed)
    late: list[int] = []

    def write(count: int) -> None:
        # Before what was deleted last, as no append does it.
        if not late:
            item = SessionItem._base_manager.create(
                branch=branch, position=0, data="{}"
            )
            late.append(item.pk)

    # It goes with its branch.
    assert finish_removals(batch_size=2, progress=write) == 9
    assert late
    assert not SessionItem._base_manager.exists()
    assert unfinished_items() == 0


def test_a_session_that_is_branched_all_the_time_is_told() -> None:
    row = make("busy", 9)
    backend, key = store_of(row)

    def branch() -> bool:
        fresh = AgentSession.objects.get()
        branches = backend.engine.branches(key)  # type: ignore[attr-defined]
        last = branches.current()
        branches.fork(last, last.head, last.turn, f"b{fresh.branch_id}")
        return True

    with pytest.raises(StorageError, match="makes branches of the session all the"):
        trim(row, 2, Removal(batch_size=1, still=AskedSelection(branch)))
    assert SessionItem._base_manager.count() == 9


@pytest.mark.parametrize(
    ("table", "code", "advice"),
    [
        ("agent_sessions_agentsession", 1, "Its own log says why."),
        ("agent_sessions_pendingclear", 3, "Run the same command again to go on."),
    ],
)
def test_a_database_that_refuses_is_told_by_its_errors_kind(
    table: str, code: int, advice: str
) -> None:
    from django.db import DatabaseError, connection

    def refuse(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if table in sql:
            raise DatabaseError("quotes what was said")
        return execute(sql, params, many, context)

    make("one")
    with connection.execute_wrapper(refuse), pytest.raises(CommandError) as caught:
        call_command("clear_agent_sessions", "one")
    assert caught.value.returncode == code
    assert str(caught.value) == (
        f"The database could not be used (DatabaseError). {advice}"
    )


@pytest.mark.parametrize("command", ["export_agent_sessions", "erase_agent_user"])
def test_an_alias_that_isn_t_there_is_an_error(command: str) -> None:
    get_user_model()._default_manager.create_user("alice")
    wrong = {"default": {"BACKEND": "no.such.Backend"}}
    args = ("alice", "--noinput") if command == "erase_agent_user" else ()
    with override_settings(AGENT_SESSIONS=wrong):
        with pytest.raises(CommandError, match="can't import BACKEND") as caught:
            call_command(command, *args, stdout=io.StringIO())
        assert caught.value.returncode == 1
