"""Real web servers whose runs are done by a real worker, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from websockets.sync.connection import Connection

from agent_sessions import get_session
from agent_sessions.items.kinds import ended_early
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs.setup import create_conversation
from tests.runs.test_servers_stop import PATIENCE, SERVERS, environment, events, served
from tests.support.chat import make_user, text_of

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

KIND = "queued"
WHOLE = "one two three four five"
ENDS = {"RUN_FINISHED", "RUN_ERROR"}


@pytest.fixture(autouse=True)
def application(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["uvicorn", "tests.support.queued_agent:application", "--port", "{port}"]
    monkeypatch.setitem(SERVERS, KIND, command)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def conversation() -> tuple[str, str]:
    """Return the id of a conversation and its user's cookie."""
    user, client = make_user(), Client()
    client.force_login(user)
    return create_conversation(user).session_id, client.cookies["sessionid"].value


@contextmanager
def worker(env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = ["-m", "django", "db_worker", "--interval=0.1", "--no-startup-delay"]
    with subprocess.Popen([sys.executable, *command], env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def up_to(tab: Connection, word: str) -> list[dict[str, Any]]:
    """Read a tab's events up to a word of the answer."""
    heard: list[dict[str, Any]] = []
    for event in events(tab):
        heard.append(event)
        if word in text_of(heard):
            return heard
    raise AssertionError(f"closed with {tab.close_code}")


def to_end(tab: Connection) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    for event in events(tab):
        heard.append(event)
        if event["type"] in ENDS and event.get("runId", "r-1") == "r-1":
            return heard
    raise AssertionError(f"closed with {tab.close_code}")


def sync(tab: Connection) -> None:
    tab.send(json.dumps({"type": "sync"}))


def answer() -> Any:
    row = AgentSession.objects.select_related("user").get()
    items: list[Any] = get_session(row.session_id, user=row.user).sync.get_items()
    return items[-1]


def test_a_run_outlives_the_web_tier(
    database_environment: dict[str, str], conversation: tuple[str, str], gate: Path
) -> None:
    env = environment(database_environment, gate, grace=0)
    with worker(env) as working:
        with (
            served(KIND, env, *conversation) as one,
            served(KIND, env, *conversation) as two,
            one.tab() as first,
            two.tab() as second,
        ):
            sync(second)
            one.say(first, "r-1")
            for tab in (first, second):
                started = up_to(tab, "three")
                assert text_of(started).split() == ["one", "two", "three"]
            for server in (one, two):
                server.process.send_signal(signal.SIGKILL)
                server.process.wait(PATIENCE)
        assert AgentRun.objects.get().status == "running"
        with served(KIND, env, *conversation) as new, new.tab() as tab:
            sync(tab)
            heard = up_to(tab, "three")
            gate.touch()
            heard += to_end(tab)
        assert text_of(heard) == WHOLE
        kinds = [event["type"] for event in heard]
        assert (kinds.count("RUN_STARTED"), kinds[-1]) == (1, "RUN_FINISHED")
        assert working.poll() is None
    assert AgentRun.objects.get().status == "completed"
    assert answer()["content"][0]["text"] == WHOLE


def test_a_stop_reaches_the_worker(
    database_environment: dict[str, str], conversation: tuple[str, str], gate: Path
) -> None:
    env = environment(database_environment, gate, grace=0)
    with (
        worker(env),
        served(KIND, env, *conversation) as server,
        server.tab() as tab,
    ):
        server.say(tab, "r-1")
        up_to(tab, "three")
        tab.send(json.dumps({"type": "abort", "runId": "r-1"}))
        [*_, end] = to_end(tab)
        assert end["outcome"] == {"type": "cancelled"}
    assert ended_early(answer())


def test_a_worker_is_killed(
    database_environment: dict[str, str], conversation: tuple[str, str], gate: Path
) -> None:
    env = environment(database_environment, gate, grace=0)
    with served(KIND, env, *conversation) as server, server.tab() as tab:
        with worker(env) as process:
            server.say(tab, "r-1")
            up_to(tab, "three")
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
        [*_, end] = to_end(tab)
        assert (end["type"], end["code"]) == ("RUN_ERROR", "interrupted")
        said = answer()
        assert ended_early(said)
        assert said["content"] == "one two three"
        # The next run is another worker's.
        gate.touch()
        with worker(env):
            server.say(tab, "r-2")
            until = time.monotonic() + PATIENCE
            while AgentRun.objects.filter(status="completed").count() == 0:
                assert time.monotonic() < until
                time.sleep(0.1)
