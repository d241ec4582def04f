"""Real servers that are stopped in the middle of an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from agent_sessions import get_session
from agent_sessions.items.kinds import ended_early
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs.setup import create_conversation
from tests.browser.demo import free_port
from tests.support.chat import make_user

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

APPLICATION = "tests.support.served_agent:application"
SERVERS = {
    "uvicorn": ["uvicorn", APPLICATION, "--port", "{port}"],
    "daphne": ["daphne", "-p", "{port}", APPLICATION],
    "granian": ["granian", "--interface", "asgi", "--port", "{port}", APPLICATION],
    "gunicorn": [
        "gunicorn",
        "--worker-class=uvicorn_worker.UvicornWorker",
        "--bind=127.0.0.1:{port}",
        "--no-control-socket",
        APPLICATION,
    ],
}
# uvicorn closes all at once and granian drops what is open, if the runs haven't ended
# sooner; daphne hears of the signal when they have.
CLOSES = {
    "uvicorn": {1012, 4503},
    "daphne": {4503},
    "granian": {1006, 4503},
    "gunicorn": {1012, 4503},
}
# Slow, loaded machines start a server in tens of seconds.
PATIENCE = 90


@dataclass
class Served:
    """A server, and a user's way to one conversation on it."""

    process: subprocess.Popen[bytes]
    port: int
    session_id: str
    cookie: str

    @contextmanager
    def tab(self) -> Iterator[Connection]:
        with connect(
            f"ws://127.0.0.1:{self.port}/ws/agents/{self.session_id}/",
            additional_headers={"Cookie": f"sessionid={self.cookie}"},
            origin=f"http://127.0.0.1:{self.port}",  # type: ignore[arg-type]
            open_timeout=PATIENCE,
        ) as tab:
            yield tab

    def say(self, tab: Connection, run_id: str) -> None:
        message = {"id": f"u-{run_id}", "role": "user", "content": "Hi"}
        frame = {"threadId": self.session_id, "runId": run_id, "messages": [message]}
        tab.send(json.dumps(frame))


@contextmanager
def served(
    kind: str, environment: dict[str, str], session_id: str, cookie: str
) -> Iterator[Served]:
    port = free_port()
    command = [part.format(port=port) for part in SERVERS[kind]]
    # A session of its own, so that none of its workers is left behind.
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        found = Served(process, port, session_id, cookie)
        try:
            _await_answer(found)
            yield found
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _await_answer(found: Served) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with found.tab():
                return
        except OSError:
            assert found.process.poll() is None, "the server ended at its start"
            assert time.monotonic() < until
            time.sleep(0.1)


def events(tab: Connection) -> Iterator[dict[str, Any]]:
    """Yield the events that a tab gets until the server closes it."""
    while True:
        try:
            frame = json.loads(tab.recv(timeout=PATIENCE))
        except ConnectionClosed:
            return
        if "chunk" in frame:
            yield frame["chunk"]


def hear_words(tab: Connection) -> Iterator[dict[str, Any]]:
    """Read on until the answer stands in its middle."""
    heard, said = events(tab), ""
    while "three" not in said:
        event = next(heard, None)
        assert event is not None, f"closed with {tab.close_code}"
        said += str(event.get("delta", ""))
    return heard


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def conversation() -> tuple[str, str]:
    """Return the id of a conversation and its user's cookie."""
    user = make_user()
    client = Client()
    client.force_login(user)
    row = create_conversation(user)
    return row.session_id, client.cookies["sessionid"].value


def environment(base: dict[str, str], gate: Path, grace: float) -> dict[str, str]:
    return base | {
        "AGENT_SESSIONS_TEST_GATE": str(gate),
        "AGENT_SESSIONS_TEST_GRACE": str(grace),
    }


def stored() -> list[Any]:
    row = AgentSession.objects.select_related("user").get()
    items: list[Any] = get_session(row.session_id, user=row.user).sync.get_items()
    return items


@pytest.mark.parametrize("kind", SERVERS)
def test_an_answer_is_broken_off_and_its_words_are_kept(
    kind: str,
    database_environment: dict[str, str],
    conversation: tuple[str, str],
    gate: Path,
) -> None:
    env = environment(database_environment, gate, grace=0.2)
    with served(kind, env, *conversation) as server:
        with server.tab() as tab:
            server.say(tab, "r-1")
            heard = hear_words(tab)
            server.process.send_signal(signal.SIGTERM)
            for _ in heard:
                pass
            assert tab.close_code in CLOSES[kind]
        server.process.wait(PATIENCE)
    run = AgentRun.objects.get()
    assert (run.status, run.error_code) == ("interrupted", "interrupted")
    row = AgentSession.objects.get()
    assert (row.state, row.run_id, row.run_owner) == ("idle", "", "")
    asked, said = stored()
    assert (asked["content"], said["content"]) == ("Hi", "one two three")
    assert ended_early(said)
    # A new process goes on at once.
    gate.touch()
    with served(kind, env, *conversation) as server, server.tab() as tab:
        server.say(tab, "r-2")
        ends = {"RUN_FINISHED", "RUN_ERROR"}
        last = next(event for event in events(tab) if event["type"] in ends)
        assert last["type"] == "RUN_FINISHED"


@pytest.mark.parametrize("kind", SERVERS)
def test_an_answer_that_ends_within_the_grace_is_whole(
    kind: str,
    database_environment: dict[str, str],
    conversation: tuple[str, str],
    gate: Path,
) -> None:
    env = environment(database_environment, gate, grace=PATIENCE)
    with served(kind, env, *conversation) as server:
        with server.tab() as tab:
            server.say(tab, "r-1")
            heard = hear_words(tab)
            server.process.send_signal(signal.SIGTERM)
            gate.touch()
            for _ in heard:
                pass
            assert tab.close_code in CLOSES[kind]
        server.process.wait(PATIENCE)
    assert AgentRun.objects.get().status == "completed"
    assert AgentSession.objects.get().state == "idle"
    said = stored()[-1]
    assert said["content"][0]["text"] == "one two three four five"
