"""Clearing many short sessions: few statements, writers go on, Ctrl-C says where."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.pace import Pace
from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.retention import Removal, Selection, Spared, remove_all
from agent_sessions.signals import session_cleared
from tests.support.waiting import wait


def make(count: int, items: int = 2) -> list[AgentSession]:
    """Make sessions whose time is over, each with as many turns as items."""
    rows = AgentSession.objects.bulk_create(
        AgentSession(session_id=f"s{n:03}", item_count=items, expires_at=timezone.now())
        for n in range(count)
    )
    for row in rows:
        row.branch = Branch.objects.create(session=row, head=items, turn=items)
    AgentSession.objects.bulk_update(rows, ["branch"])
    SessionItem.objects.bulk_create(
        SessionItem(
            branch=row.branch,
            position=n,
            turn=n,
            type="message",
            role="user",
            data='{"role": "user", "content": "Hello"}',
        )
        for row in rows
        for n in range(1, items + 1)
    )
    return rows


def run(*args: str) -> tuple[str, str, int]:
    """Return what the command prints, and how many statements it needs."""
    out, err = io.StringIO(), io.StringIO()
    with CaptureQueriesContext(connection) as queries:
        call_command("clear_agent_sessions", *args, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue(), len(queries)


def start(environment: dict[str, str], *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "django", "clear_agent_sessions", *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.django_db
@pytest.mark.parametrize("how", [(), ("--delete", "--noinput")])
def test_short_sessions_need_few_statements(how: tuple[str, ...]) -> None:
    make(60)
    said, _, statements = run("--expired", *how)
    assert said.endswith("ed 60 sessions with 120 items.\n")
    # Two transactions.
    assert statements < 60
    assert not SessionItem._base_manager.exists()


@pytest.mark.django_db
def test_one_of_many_runs_is_deleted_by_itself() -> None:
    rows = make(30)
    AgentRun.objects.bulk_create(
        AgentRun(session=rows[number % 30 if number < 60 else 3], run_id=f"r{number}")
        for number in range(700)
    )
    said, _, statements = run("--expired", "--delete", "--noinput")
    assert said == "Deleted 30 sessions with 60 items.\n"
    assert statements < 110
    assert not AgentRun._base_manager.exists()
    assert not AgentSession._base_manager.exists()


@pytest.mark.django_db(transaction=True)
def test_each_of_them_is_told_to_whoever_listens() -> None:
    make(3)
    heard: list[tuple[str, int]] = []

    def hear(sender: Any, **kwargs: Any) -> None:
        heard.append((kwargs["session_id"], kwargs["count"]))

    session_cleared.connect(hear)
    try:
        run("--expired")
    finally:
        session_cleared.disconnect(hear)
    assert heard == [("s000", 2), ("s001", 2), ("s002", 2)]


@pytest.mark.django_db
def test_those_that_stay_keep_none_of_the_others_back() -> None:
    rows = make(5)
    AgentSession.objects.filter(pk=rows[1].pk).update(
        run_id="r", run_seen_at=timezone.now()
    )
    wait(rows[2], "w")
    AgentSession.objects.filter(pk=rows[3].pk).update(expires_at=None)
    found = dict(remove_all(rows, Removal(still=Selection(expired=True))))
    assert [found[rows[n]] for n in (0, 4)] == [2, 2]
    assert isinstance(found[rows[1]], Spared)
    assert isinstance(found[rows[2]], Spared)
    # It is no longer meant.
    assert found[rows[3]] is None
    left = set(AgentSession.objects.exclude(item_count=0))
    assert left == {rows[1], rows[2], rows[3]}
    assert SessionItem.objects.count() == 6


@pytest.mark.django_db
@pytest.mark.one_database
def test_one_that_can_t_be_removed_keeps_none_of_the_others_back() -> None:
    rows = make(5)
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TEMP TRIGGER stays BEFORE DELETE ON agent_sessions_sessionitem "
            f"WHEN OLD.branch_id = {rows[2].branch_id} "
            "BEGIN SELECT RAISE(ABORT, 'a secret'); END"
        )
        try:
            _, err, _ = run("s000", "s001", "s003", "s004", "--noinput")
            with pytest.raises(Exception, match="1 session was left as it is"):
                run("--expired")
        finally:
            cursor.execute("DROP TRIGGER stays")
    assert "secret" not in err
    assert set(AgentSession.objects.exclude(item_count=0)) == {rows[2]}


@pytest.mark.django_db
def test_sessions_of_few_turns_are_not_looked_into() -> None:
    make(40)
    args = ("--all", "--keep-last-turns", "2", "--dry-run")
    said, _, statements = run(*args)
    assert said == "Would remove 0 items of 0 sessions.\n"
    assert statements < 20
    AgentRun.objects.all().delete()
    long = AgentSession.objects.get(session_id="s007")
    sessions["default"].append(
        SessionKey("s007"), [{"role": "user", "content": "more"}]
    )
    assert run(*args)[0] == "Would remove 1 item of 1 session.\n"
    assert run(*args[:-1], "--noinput")[0] == "Removed 1 item of 1 session.\n"
    assert SessionItem.objects.filter(branch=long.branch_id).count() == 2


@pytest.mark.django_db(transaction=True)
def test_nobody_who_writes_waits_for_all_of_them(
    database_environment: dict[str, str],
) -> None:
    make(400)
    process = start(database_environment)
    waits, key = list[float](), SessionKey("writes")
    while process.poll() is None:
        began = time.monotonic()
        sessions["default"].append(key, [{"role": "user", "content": "Hello"}])
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    told = process.communicate()
    assert process.returncode == 0, told
    # Without a rest after each transaction SQLite's writers waited for seconds.
    assert max(waits) < 2
    assert not AgentSession.objects.filter(session_id__startswith="s0").exclude(
        item_count=0
    )


@pytest.mark.django_db(transaction=True)
def test_a_long_transaction_is_followed_by_a_shorter_one() -> None:
    store = sessions["default"].in_database
    assert store is not None
    pace, sizes = Pace(connection.alias, BATCH_SIZE), []
    for seconds in (0.2, 0, 0, 0, 0.2):
        store.engine.atomically(partial(pace.timed(time.sleep), seconds))
        pace.rest(0)
        sizes.append(pace.size)
    if connection.vendor == "sqlite":
        # A machine that stands still meanwhile may make it shorter yet.
        assert sizes[0] < BATCH_SIZE // 4
        assert sizes[0] <= sizes[3] <= BATCH_SIZE
        assert sizes[4] < BATCH_SIZE
    else:
        # Only SQLite has one writer at a time.
        assert sizes == [BATCH_SIZE] * 5


@pytest.mark.django_db
def test_within_a_transaction_nothing_is_waited_for() -> None:
    pace = Pace(connection.alias, BATCH_SIZE)
    pace.timed(time.sleep)(0.2)
    began = time.monotonic()
    pace.rest(100)
    assert time.monotonic() - began < 10
    assert pace.size == BATCH_SIZE


@pytest.mark.django_db(transaction=True)
def test_ctrl_c_says_in_one_line_what_is_done_and_how_to_go_on(
    database_environment: dict[str, str],
) -> None:
    make(1, items=2_000)
    process = start(database_environment, "s000", "--batch-size", "1", "--progress")
    assert process.stderr is not None
    told = ""
    while re.search(r"\b[1-9]\d*/2,000", told) is None:
        piece = process.stderr.read(1)
        assert piece, f"it ended before it could be interrupted: {told}"
        told += piece
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        "CommandError: Stopped. Cleared 1 session with 2000 items. Run the same command "
        "again to go on."
    )
    assert SessionItem._base_manager.exists()
    out, _, _ = run("s000")
    assert "that an earlier call had removed" in out
    assert not SessionItem._base_manager.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("name", ["list", "show"])
def test_ctrl_c_ends_what_only_reads_without_a_traceback(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Selection, "queries", interrupt)
    args = ["s000"] if name == "show" else []
    command = f"{name}_agent_session{'' if name == 'show' else 's'}"
    with pytest.raises(CommandError, match=r"^Stopped\.$") as stopped:
        call_command(command, *args)
    assert stopped.value.returncode == 130
