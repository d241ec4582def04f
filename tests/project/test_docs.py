"""What the README and the docs say, held against the code."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from agents import Agent
from django.utils.module_loading import import_string

from agent_sessions import consumers, exceptions
from agent_sessions.backends.base import BaseSessionBackend
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.consumers import AgentConsumer
from agent_sessions.runs import RunLimits
from agent_sessions.runs.failures import MESSAGES
from agent_sessions.runs.pages import SNAPSHOT_BYTES
from agent_sessions.views import SessionListView, SessionMessagesView
from tests.support.documents import ROOT, append, blocks, column, files, page, run

README = page("README.md")
WEBSOCKET = page("docs/websocket.md")
SESSIONS = page("docs/sessions.md")

# Where each command of the README is run; pip installs the wheel there.
RUN_BY = {
    "make demo": "tests/project/test_demo.py",
    'pip install "django-agent-sessions[channels]"': "tests/project/test_project.py",
    "python manage.py migrate": "tests/project/test_docs.py",
    "python manage.py check": "tests/project/test_docs.py",
}


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    commands = {
        line for block in blocks(README, "console") for line in block.splitlines()
    }
    assert commands == RUN_BY.keys()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 160
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
    assert (RunLimits().detach_timeout, RunLimits().stale_after) == (60, 15)
    assert RunLimits().keep_log == 120


def test_the_code_of_the_websocket_page_runs() -> None:
    names: dict[str, Any] = {"support_agent": Agent(name="support")}
    exec("from django.urls import path", names)
    exec("from agent_sessions.consumers import AgentConsumer", names)
    for code in blocks(WEBSOCKET, "python"):
        exec("(" + code + ")" if code.startswith("path(") else code, names)
    assert names["AGENT_SESSIONS_CHAT_BACKEND"] == "redis"
    for name in ("SupportConsumer", "CompactingConsumer"):
        assert names[name].as_asgi(agent=names["support_agent"])
    for name in ("SupportSessions", "SupportSession", "SupportMessages"):
        assert names[name].as_view()


def test_every_error_is_in_the_table() -> None:
    errors = {
        name
        for name, kind in vars(exceptions).items()
        if isinstance(kind, type)
        and issubclass(kind, exceptions.AgentSessionError)
        and name != "AgentSessionError"
    }
    assert column(SESSIONS, "error") == errors


def test_the_options_are_those_of_the_backend() -> None:
    (settings,) = (b for b in blocks(README, "python") if "AGENT_SESSIONS" in b)
    namespace: dict[str, object] = {}
    exec(settings, namespace)
    assert namespace["AGENT_SESSIONS_CHAT_BACKEND"] == AgentConsumer.backend
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
    """Follow the README in a new project, then talk to its agent in both ways."""
    run(tmp_path, "-m", "django", "startproject", "mysite", ".")
    given = files(README)
    assert given.keys() == {
        "mysite/agents.py",
        "mysite/views.py",
        "mysite/settings.py",
        "mysite/urls.py",
        "mysite/asgi.py",
    }
    setup = [given[f"mysite/{name}.py"] for name in ("settings", "urls", "asgi")]
    code = [line for block in setup for line in block.splitlines() if line.strip()]
    assert len([line for line in code if not line.startswith("#")]) <= 14
    append(tmp_path, given | {"mysite/agents.py": given["mysite/agents.py"] + _MODEL})
    (tmp_path / "talk.py").write_text(_TALK)
    run(tmp_path, "manage.py", "migrate", "-v0")
    assert "ERROR" not in run(tmp_path, "manage.py", "check")
    said = run(tmp_path, "talk.py").splitlines()
    assert said == ["Nice to meet you", "You are Alice", "4 items, 2 runs", "201", "Hi"]


# What the README leaves to a provider.
_MODEL = textwrap.dedent(
    """
    from agents.testing import ScriptedModel, assistant_message

    answers = ["Nice to meet you", "You are Alice", "Hi"]
    support_agent.model = ScriptedModel([[assistant_message(each)] for each in answers])
    """
)

_TALK = textwrap.dedent(
    """
    import asyncio, json, os

    os.environ["DJANGO_SETTINGS_MODULE"] = "mysite.settings"
    from mysite.asgi import application
    from agent_sessions.models import AgentRun, SessionItem
    from asgiref.sync import sync_to_async
    from channels.testing.websocket import WebsocketCommunicator
    from django.contrib.auth.models import User
    from django.test import Client


    def log_in():
        client = Client(SERVER_NAME="localhost")
        assert client.post("/ask/", {"text": "Hi"}).status_code == 302
        client.force_login(User.objects.create_user("alice"))
        for text in ("My name is Alice", "What's my name?"):
            print(client.post("/ask/", {"text": text}).json()["answer"])
        print(f"{SessionItem.objects.count()} items, {AgentRun.objects.count()} runs")
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
        assert (row[rewrite] != "no") == (hasattr(kind, "rewrite") or kind.encrypts)
