"""manage.py clear_agent_sessions: by age, by settings, in every backend.

Growth without retention: langchain-ai/langgraph PR #6661 and #6883, langgraphjs #1138,
aegra #288; open-webui #16564 asks for a policy and a command.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
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
from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, SessionItem
from agent_sessions.retention import Removal, remove, unfinished_items
from tests.support.list_backend import ListBackend
from tests.support.waiting import wait

DATABASE: dict[str, Any] = {"BACKEND": DATABASE_BACKEND}
KEPT = {"max_idle": "30d", "max_age": timedelta(days=365)}


def make(
    session_id: str,
    *,
    items: int = 2,
    user: Any = None,
    backend: str = "default",
    idle: int = 0,
    age: int = 0,
    **columns: Any,
) -> AgentSession:
    """Make a session that was last used `idle` days ago and is `age` days old."""
    key = SessionKey(session_id, user and user.pk)
    batch = [{"role": "user", "content": f"message {n}"} for n in range(items)]
    sessions[backend].append(key, batch)
    rows = AgentSession.objects.filter(backend=backend, session_id=session_id)
    used = timezone.now() - timedelta(days=idle)
    rows.update(
        updated_at=used,
        active_on=used.date(),
        created_at=timezone.now() - timedelta(days=max(age, idle)),
        **columns,
    )
    return rows.get()


def run(*args: str, code: int = 0, **options: Any) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    given = {"stdout": out, "stderr": err, **options}
    if not code:
        call_command("clear_agent_sessions", *args, **given)
        return out.getvalue(), err.getvalue()
    with pytest.raises(CommandError) as caught:
        call_command("clear_agent_sessions", *args, **given)
    assert caught.value.returncode == code
    err.write(str(caught.value))
    return out.getvalue(), err.getvalue()


def filled() -> set[str]:
    """Return the sessions that still have items."""
    rows = AgentSession.objects.exclude(item_count=0)
    return set(rows.values_list("session_id", flat=True))


@pytest.fixture
def kept() -> Iterator[None]:
    setting = {
        "default": DATABASE | {"OPTIONS": KEPT},
        "other": DATABASE,
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield


@pytest.fixture
def alice() -> Any:
    return get_user_model()._default_manager.create_user("alice")


@pytest.mark.django_db
@pytest.mark.usefixtures("kept")
class TestSettings:
    def test_what_is_idle_old_or_over_goes_without_a_question(self) -> None:
        make("used", idle=29)
        make("idle", idle=31, items=3)
        make("old", age=366)
        make("over", expires_at=timezone.now())
        make("not yet", expires_at=timezone.now() + timedelta(minutes=1))
        make("elsewhere", backend="other", idle=400)
        assert run() == ("Cleared 3 sessions with 7 items.\n", "")
        assert filled() == {"used", "not yet", "elsewhere"}
        assert run() == ("Cleared 0 sessions with 0 items.\n", "")

    def test_idle_alone(self) -> None:
        make("idle", idle=31)
        make("old", age=366)
        make("over", expires_at=timezone.now())
        run("--idle")
        assert filled() == {"old", "over"}

    def test_expired_alone(self) -> None:
        make("idle", idle=31)
        make("old", age=366)
        make("over", expires_at=timezone.now())
        run("--expired")
        assert filled() == {"idle"}

    def test_one_backend_alone(self) -> None:
        make("idle", idle=31)
        make("elsewhere", backend="other", idle=31)
        out, _ = run("--backend", "other")
        assert out == (
            "No backend has max_idle or max_age in its OPTIONS: only sessions whose "
            "own time is over are looked for.\nCleared 0 sessions with 0 items.\n"
        )
        run("--backend", "default", "--backend", "other")
        assert filled() == {"elsewhere"}

    def test_one_owner_alone(self, alice: Any) -> None:
        make("hers", idle=31, user=alice)
        make("nobodys", idle=31)
        run("--idle", "--user", "alice")
        assert filled() == {"nobodys"}
        run("--idle", "--unowned")
        assert filled() == set()

    def test_deleting_is_asked_about(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make("one", idle=31)
        make("two", idle=31)
        asked: list[str] = []

        def refuse(question: str) -> str:
            asked.append(question)
            return "n"

        monkeypatch.setattr("builtins.input", refuse)
        run("--delete", code=1)
        assert asked == ["Delete 2 sessions with 4 items? This can't be undone. [y/N] "]
        assert run("--delete", "--noinput")[0] == "Deleted 2 sessions with 4 items.\n"
        assert not AgentSession.objects.exists()

    def test_who_is_busy_is_left_for_the_next_time(self) -> None:
        make("busy", idle=31, run_id="r", run_seen_at=timezone.now())
        wait(make("waits", idle=31), "w")
        assert run() == (
            "Cleared 0 sessions with 0 items.\n",
            "busy: left out, because run r is active.\n"
            "waits: left out, because it waits for an approval.\n",
        )
        assert filled() == {"busy", "waits"}

    def test_a_session_that_is_used_meanwhile_stays(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        row = make("idle", idle=31)
        from agent_sessions.retention import Selection

        selection = Selection(idle=True)
        assert list(selection.rows()) == [row]
        sessions["default"].append(
            SessionKey("idle"), [{"role": "user", "content": ""}]
        )
        assert remove(row, Removal(still=selection)) is None
        assert filled() == {"idle"}


@pytest.mark.django_db
def test_without_limits_that_is_told_and_nothing_goes() -> None:
    make("idle", idle=9_999)
    out, _ = run()
    assert out.startswith("No backend has max_idle or max_age in its OPTIONS")
    assert filled() == {"idle"}


@pytest.mark.django_db
class TestAge:
    def test_older_than_counts_from_the_last_activity(self) -> None:
        make("used", idle=1, age=400)
        make("idle", idle=3)
        assert run("--older-than", "2d")[0] == "Cleared 1 session with 2 items.\n"
        assert filled() == {"used"}

    @pytest.mark.parametrize("text", ["30", "month", "0d"])
    def test_what_is_no_age_is_an_error(self, text: str) -> None:
        with pytest.raises(CommandError, match="--older-than"):
            run("--older-than", text)

    def test_an_age_before_all_time_finds_nothing(self) -> None:
        make("idle", idle=9_999)
        assert "0 sessions" in run("--older-than", "999999d")[0]

    def test_more_than_one_is_asked_about(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("one", idle=3)
        make("two", idle=3)

        def nobody(question: str) -> str:
            raise EOFError

        monkeypatch.setattr("builtins.input", nobody)
        _, err = run("--older-than", "2d", code=1)
        assert err == "There is nobody to ask. Use --noinput to go on without."
        assert filled() == {"one", "two"}

    def test_who_is_busy_is_counted_where_he_was_asked_for(self) -> None:
        make("busy", idle=3, run_id="r", run_seen_at=timezone.now())
        make("idle", idle=3)
        _, err = run("--older-than", "2d", "--noinput", code=3)
        assert err == (
            "busy: left out, because run r is active.\n1 session was left as it is."
        )
        assert filled() == {"busy"}


@pytest.mark.one_database
@pytest.mark.django_db
class TestAll:
    def test_everything_of_everybody(self, alice: Any) -> None:
        make("one")
        make("two", user=alice)
        assert run("--all", "--noinput")[0] == "Cleared 2 sessions with 4 items.\n"
        assert filled() == set()

    def test_an_owner_needs_no_all(self, alice: Any) -> None:
        make("one")
        make("two", user=alice)
        run("--user", "alice", "--delete")
        assert set(AgentSession.objects.values_list("session_id", flat=True)) == {"one"}

    def test_named_sessions_are_narrowed_by_age(self) -> None:
        make("used")
        make("idle", idle=3)
        _, err = run("used", "idle", "--older-than", "2d", code=1)
        assert err == "There is no such session: 'used'. Nothing was written."
        run("idle", "--older-than", "2d")
        assert filled() == {"used"}

    def test_more_than_a_chunk(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(1_100)
        )
        assert "1100 sessions" in run("--all", "--noinput", "--dry-run")[0]


@pytest.mark.django_db
class TestTurns:
    def test_only_the_last_turns_stay(self) -> None:
        make("one", items=5)
        make("two", items=2)
        args = ("--all", "--noinput", "--keep-last-turns", "3")
        assert run(*args, "--dry-run")[0] == "Would remove 2 items of 1 session.\n"
        assert run(*args) == ("Removed 2 items of 1 session.\n", "")
        counts = dict(AgentSession.objects.values_list("session_id", "item_count"))
        assert counts == {"one": 3, "two": 2}

    def test_the_question_says_what_stays(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("one")
        make("two")
        asked: list[str] = []

        def refuse(question: str) -> str:
            asked.append(question)
            return ""

        monkeypatch.setattr("builtins.input", refuse)
        run("--all", "--keep-last-turns", "1", code=1)
        assert asked == [
            "Keep only the last 1 turn of 2 sessions with 4 items? This can't be "
            "undone. [y/N] "
        ]

    def test_delete_is_no_way_to_keep_something(self) -> None:
        with pytest.raises(CommandError, match="not allowed with"):
            run("one", "--delete", "--keep-last-turns", "1")

    def test_a_session_that_can_t_be_shortened_is_named(self) -> None:
        make("one", items=5)
        SessionItem._base_manager.filter(position=4).update(turn=1)
        for dry in ((), ("--dry-run",)):
            _, err = run("one", "--keep-last-turns", "1", *dry, code=3)
            assert "Mend it with check_agent_sessions --repair.\n" in err
        assert filled() == {"one"}


@pytest.mark.one_database
@pytest.mark.django_db
class TestOtherStores:
    @pytest.fixture(autouse=True)
    def two_stores(self) -> Iterator[None]:
        listed = {"BACKEND": ListBackend, "OPTIONS": KEPT}
        ListBackend.histories.clear()
        setting = {"default": DATABASE | {"OPTIONS": KEPT}, "lists": listed}
        with override_settings(AGENT_SESSIONS=setting):
            yield
        ListBackend.histories.clear()

    def test_all_are_cleared_by_the_same_words(self, alice: Any) -> None:
        make("one", idle=31)
        make("two", idle=31, user=alice, backend="lists")
        make("new", backend="lists")
        assert run()[0] == (
            "default: Cleared 1 session with 2 items.\n"
            "lists: Cleared 1 session with 2 items.\n"
        )
        assert ListBackend.histories.keys() == {(None, "new")}

    def test_delete_takes_the_row_after_the_items(self) -> None:
        make("one", backend="lists")
        run("one", "--delete")
        assert not ListBackend.histories
        assert not AgentSession.objects.exists()

    def test_one_id_in_two_stores_is_two_sessions(self) -> None:
        make("one")
        make("one", backend="lists")
        run("one", "--backend", "lists")
        assert AgentSession.objects.get(backend="default").item_count == 2
        make("one", backend="lists")
        assert run("one", "--noinput")[0].count("1 session with 2 items") == 2

    def test_stores_that_can_t_remove_turns_say_so(self) -> None:
        make("one", items=5)
        make("two", items=5, backend="lists")
        out, err = run("--all", "--noinput", "--keep-last-turns", "1")
        assert out == "Removed 4 items of 1 session.\n"
        assert err == (
            "lists: ListBackend can't remove single turns; its sessions are left out.\n"
        )
        _, err = run("--all", "--backend", "lists", "--keep-last-turns", "1", code=1)
        assert (
            err == "lists: ListBackend can't remove single turns. Nothing was written."
        )
        with override_settings(AGENT_SESSIONS={"default": {"BACKEND": ListBackend}}):
            _, err = run("--all", "--keep-last-turns", "1", code=1)
        assert err.endswith("No backend can remove single turns. Nothing was written.")

    def test_a_session_of_no_backend_is_told_and_left(self) -> None:
        AgentSession.objects.create(backend="gone", session_id="lost")
        _, err = run("--all", "--noinput", code=3)
        assert err.startswith("lost: AGENT_SESSIONS has no alias 'gone'")
        assert AgentSession.objects.filter(backend="gone").exists()


@pytest.mark.one_database
@pytest.mark.django_db
class TestProgress:
    def test_the_bar_ends_with_everything_done(self) -> None:
        make("long", items=BATCH_SIZE + 100)
        make("short", items=3)
        err = io.StringIO()
        out = run("--all", "--noinput", "--progress", stderr=err)[0]
        assert out == f"Cleared 2 sessions with {BATCH_SIZE + 103} items.\n"
        assert "100% 603/603 items" in err.getvalue().splitlines()[-1]
        assert not SessionItem._base_manager.exists()

    def test_there_is_none_where_nobody_looks(self) -> None:
        make("one")
        assert run("one")[1] == ""
        assert run("one", "--progress", verbosity=0)[0] == ""

    def test_what_an_earlier_call_left_is_deleted_first(self) -> None:
        remove(make("long", items=9), Removal(batch_size=2))
        make("one")
        assert unfinished_items() == 9
        assert run("one", "--dry-run")[0] == "Would clear 1 session with 2 items.\n"
        assert unfinished_items() == 9
        assert run("one", "--batch-size", "2")[0] == (
            "Deleted 9 items that an earlier call had removed.\n"
            "Cleared 1 session with 2 items.\n"
        )
        assert not SessionItem._base_manager.exists()

    @pytest.mark.parametrize("size", ["0", "-1", "many", "1.5"])
    def test_a_batch_has_at_least_one_row(self, size: str) -> None:
        with pytest.raises(CommandError, match="whole number of 1 or more"):
            run("one", "--batch-size", size)


def start(environment: dict[str, str], *args: str) -> subprocess.Popen[str]:
    """Run the command in a process of its own, as cron does."""
    return subprocess.Popen(
        [sys.executable, "-m", "django", "clear_agent_sessions", *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.django_db(transaction=True)
def test_two_processes_at_once_clear_everything_once(
    database_environment: dict[str, str],
) -> None:
    over = timezone.now()
    for number in range(15):
        make(f"s{number}", items=11, expires_at=over)
    make("stays", items=3)
    processes = [start(database_environment, "--batch-size", "5") for _ in range(2)]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    found = [
        re.search(r"Cleared (\d+) sessions? with (\d+) item", out) for out, _ in told
    ]
    sums = [sum(int(match[n]) for match in found if match) for n in (1, 2)]
    assert sums == [15, 165]
    assert filled() == {"stays"}
    # Each leaves to the other what that one holds, and the last one has finished.
    run()
    assert SessionItem._base_manager.count() == 3
    assert unfinished_items() == 0


@pytest.mark.django_db(transaction=True)
def test_a_process_that_is_killed_leaves_nothing_for_ever(
    database_environment: dict[str, str],
) -> None:
    make("long", items=1_500)
    process = start(database_environment, "long", "--batch-size", "1", "--progress")
    assert process.stderr is not None
    # The first picture of the bar: an item is deleted, thousands are not.
    told = ""
    while re.search(r"\b[1-9]\d*/1,500", told) is None:
        piece = process.stderr.read(1)
        assert piece, f"it ended before it could be killed: {told}"
        told += piece
    process.kill()
    process.communicate()
    assert filled() == set()
    assert 0 < SessionItem._base_manager.count() == unfinished_items() < 1_500
    run("long")
    assert not SessionItem._base_manager.exists()
