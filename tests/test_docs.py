"""What the README and the docs say, held against the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from django.utils.module_loading import import_string

from agent_sessions import consumers, exceptions
from agent_sessions.backends.base import BaseSessionBackend
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.consumers import AgentConsumer
from agent_sessions.runs import RunLimits
from agent_sessions.runs.errors import MESSAGES
from agent_sessions.runs.sync import SNAPSHOT_BYTES
from agent_sessions.views import SessionListView, SessionMessagesView

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEBSOCKET = (ROOT / "docs" / "websocket.md").read_text(encoding="utf-8")
SESSIONS = (ROOT / "docs" / "sessions.md").read_text(encoding="utf-8")

# Where each command of the README is run; pip installs the wheel there.
RUN_BY = {
    "make demo": "tests/test_demo.py",
    "make test": ".ci/run",
    'pip install "django-agent-sessions[channels]"': "tests/test_project.py",
    "python manage.py migrate": "tests/test_docs.py",
    "python manage.py check": "tests/test_docs.py",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def column(text: str, heading: str) -> set[str]:
    """Give the first column of the table that begins with a heading."""
    table = re.search(
        rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.MULTILINE
    )
    assert table, f"no table {heading!r}"
    cells = (line.split("|")[1] for line in table[1].splitlines())
    return {word for cell in cells for word in re.findall(r"[\w.]+", cell)}


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    commands = {
        line for block in blocks(README, "console") for line in block.splitlines()
    }
    assert commands == RUN_BY.keys()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_close_codes_are_those_of_the_consumer() -> None:
    codes = {
        str(value) for name, value in vars(consumers).items() if name[:6] == "CLOSE_"
    }
    assert column(WEBSOCKET, "close code") == codes


def test_the_error_codes_are_those_of_the_runs() -> None:
    assert column(WEBSOCKET, "code") == set(MESSAGES)


def test_the_limits_are_those_of_the_code() -> None:
    assert f"more than {AgentConsumer.max_runs_per_minute} runs a minute" in WEBSOCKET
    sessions = SessionListView.max_sessions_per_minute
    assert f"more than {sessions} new sessions a minute" in WEBSOCKET
    runs = AgentConsumer.max_runs_per_minute
    assert f"may start {runs} runs and make {sessions} sessions a minute" in WEBSOCKET
    assert f"{SessionListView.page_size} sessions, the last used first" in WEBSOCKET
    assert f"the last {SessionMessagesView.page_size} items' messages" in WEBSOCKET
    assert f"longer than {SessionMessagesView.max_bytes >> 20} MiB" in WEBSOCKET
    assert f"every {AgentConsumer.ping_interval} seconds" in WEBSOCKET
    assert f"up to {AgentConsumer.max_frame // 1024} KiB" in WEBSOCKET
    flat = " ".join(WEBSOCKET.split())
    assert f"`recheck_after`, {AgentConsumer.recheck_after} seconds" in flat
    assert f"`recheck_interval`, {AgentConsumer.recheck_interval} seconds" in flat
    assert f"fit into {SNAPSHOT_BYTES // 1024} KiB" in flat
    table = re.findall(r"^\| `(max_\w+)` \| (\d+)( KiB)? \|", WEBSOCKET, re.MULTILINE)
    assert len(table) == 6
    for name, number, unit in table:
        value = getattr(AgentConsumer, name)
        assert int(number) * (1024 if unit else 1) == value
    assert (RunLimits().detach_timeout, RunLimits().stale_after) == (60, 60)
    assert RunLimits().keep_log == 120


def test_every_error_is_in_the_table() -> None:
    errors = {
        name
        for name, kind in vars(exceptions).items()
        if isinstance(kind, type)
        and issubclass(kind, exceptions.AgentSessionError)
        and name not in {"AgentSessionError", "InterruptError"}
    }
    assert column(SESSIONS, "error") == errors


def test_the_options_are_those_of_the_backend() -> None:
    (settings,) = (b for b in blocks(README, "python") if "AGENT_SESSIONS" in b)
    namespace: dict[str, object] = {}
    exec(settings, namespace)
    assert namespace["AGENT_SESSIONS"] == {
        "default": {
            "BACKEND": f"{DatabaseBackend.__module__.rpartition('.')[0]}.DatabaseBackend",
            "OPTIONS": DatabaseBackend.retention_defaults
            | DatabaseBackend.option_defaults,
        }
    }


def test_the_backends_of_the_readme_are_there() -> None:
    names = re.findall(r"^\| \[?`([\w.]+Backend)`", README, re.MULTILINE)
    assert len(names) == 6
    for name in names:
        backend = import_string(f"agent_sessions.backends.{name}")
        assert issubclass(backend, BaseSessionBackend)


def test_the_lines_of_the_readme_make_a_project_work(tmp_path: Path) -> None:
    """Follow the README in a new project, then talk to its agent over a websocket."""
    run(tmp_path, "-m", "django", "startproject", "mysite", ".")
    files = {
        re.match(r"# (\S+?),?(\s|$)", block)[1]: block  # type: ignore[index]
        for block in blocks(README, "python")
        if block.startswith("# mysite/")
    }
    assert files.keys() == {
        "mysite/settings.py",
        "mysite/urls.py",
        "mysite/asgi.py",
    }
    code = [line for b in files.values() for line in b.splitlines() if line.strip()]
    assert len([line for line in code if not line.startswith("#")]) <= 12
    for name, block in files.items():
        path = tmp_path / name
        path.write_text(path.read_text() + "\n" + block)
    (tmp_path / "mysite" / "agents.py").write_text(_AGENT)
    (tmp_path / "talk.py").write_text(_TALK)
    run(tmp_path, "manage.py", "migrate", "-v0")
    assert "ERROR" not in run(tmp_path, "manage.py", "check")
    assert run(tmp_path, "talk.py").split() == ["201", "Hello", "Alice"]


def run(directory: Path, *arguments: str) -> str:
    env = {key: v for key, v in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return done.stdout + done.stderr


_AGENT = textwrap.dedent(
    """
    from agents import Agent
    from agents.testing import ScriptedModel, assistant_message

    model = ScriptedModel([[assistant_message("Hello Alice")]])
    support_agent = Agent(name="Support", model=model)
    """
)

_TALK = textwrap.dedent(
    """
    import asyncio, json, os

    os.environ["DJANGO_SETTINGS_MODULE"] = "mysite.settings"
    os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
    from mysite.asgi import application
    from asgiref.sync import sync_to_async
    from channels.testing.websocket import WebsocketCommunicator
    from django.contrib.auth.models import User
    from django.test import Client


    def log_in():
        client = Client(SERVER_NAME="localhost")
        client.force_login(User.objects.create_user("alice"))
        response = client.post("/agents/sessions/")
        print(response.status_code)
        return client.cookies["sessionid"].value, response.json()["id"]


    async def main():
        cookie, session_id = await sync_to_async(log_in)()
        headers = [
            (b"cookie", f"sessionid={cookie}".encode()),
            (b"origin", b"http://localhost"),
        ]
        path = f"/ws/agents/{session_id}/"
        tab = WebsocketCommunicator(application, path, headers=headers)
        assert (await tab.connect())[0]
        message = {"id": "u", "role": "user", "content": "Hi"}
        frame = {"threadId": session_id, "runId": "r", "messages": [message]}
        await tab.send_to(text_data=json.dumps(frame))
        while True:
            event = json.loads(await tab.receive_from(5))["chunk"]
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                print(event["delta"])
            if event["type"] in {"RUN_FINISHED", "RUN_ERROR"}:
                break
        await tab.disconnect()


    asyncio.run(main())
    """
)


def test_one_table_says_of_each_backend_what_is_done_once() -> None:
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    table = text.split("## Once, whole, and by whom")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    head, rows = lines[0], lines[2:]
    operations = ("append", "read", "pop", "clear", "replace", "rewrite", "copy")
    assert [cell.split(" (")[0] for cell in head[1:-1]] == list(operations)
    by_name = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    rewrite = head.index("rewrite (new keys)")
    for path in re.findall(r"`(agent_sessions\.backends\.\w+\.\w+)`", text):
        kind = import_string(path)
        row = by_name[kind.__name__]
        assert len(row) == len(head)
        assert (row[rewrite] != "no") == (kind.supports_rewriting or kind.encrypts)
