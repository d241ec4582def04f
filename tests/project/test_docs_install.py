"""docs/install.md and the tests of docs/sessions.md, followed in a new project."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.browser.demo import free_port
from tests.support.documents import (
    append,
    blocks,
    environment,
    files,
    page,
    run,
    section,
)

INSTALL = page("docs/install.md")
SESSIONS = page("docs/sessions.md")
CSS = "/static/admin/css/base.css"

# What the page leaves to a provider.
_MODEL = textwrap.dedent(
    """
    from agents.testing import ScriptedModel, assistant_message

    support_agent.model = ScriptedModel([[assistant_message("Hello")]])
    """
)
_CONVERSATION = textwrap.dedent(
    """
    import os, json, django
    os.environ["DJANGO_SETTINGS_MODULE"] = "mysite.settings"
    django.setup()
    from django.contrib.auth.models import User
    from django.test import Client

    client = Client(SERVER_NAME="localhost")
    client.force_login(User.objects.get_or_create(username="alice")[0])
    session_id = client.post("/agents/sessions/").json()["id"]
    print(json.dumps([client.cookies["sessionid"].value, session_id]))
    """
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has followed the page up to where it is served."""
    directory = tmp_path_factory.mktemp("project")
    run(directory, "-m", "django", "startproject", "mysite", ".")
    for title in (
        "What to install",
        "The model's key, and traces",
        "An agent in a view",
        "An agent on a websocket",
    ):
        append(directory, files(section(INSTALL, title)))
    append(directory, {"mysite/agents.py": _MODEL})
    run(directory, "manage.py", "migrate", "-v0")
    assert "ERROR" not in run(directory, "manage.py", "check")
    return directory


def test_the_trace_stays_here(project: Path) -> None:
    code = (
        "import mysite.settings\nfrom agents import trace\nprint(trace('t').trace_id)"
    )
    # The test's own variable would keep it here as well.
    kept = environment()
    del kept["OPENAI_AGENTS_DISABLE_TRACING"]
    for source, id_ in ((code, "no-op"), (code.partition("\n")[2], "trace_")):
        done = subprocess.run(
            [sys.executable, "-c", source],
            cwd=project,
            env=kept,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(id_)


def test_the_checks_look_at_the_channel_layer(project: Path) -> None:
    said = run(project, "manage.py", "check", "--deploy", "--fail-level=CRITICAL")
    assert "agent_sessions.W021" in said


@contextmanager
def served(project: Path, *arguments: str) -> Iterator[int]:
    """Serve the project until the block ends; `{port}` becomes the port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, *(each.format(port=port) for each in arguments)],
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("nothing is served")


def status(port: int, path: str) -> int:
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}"), timeout=30) as answer:
            found: int = answer.status
    except HTTPError as error:
        return error.code
    except URLError as error:
        pytest.fail(str(error))
    return found


@pytest.fixture(scope="module")
def alice(project: Path) -> list[str]:
    """Return the cookie of a user, and the id of her conversation."""
    found: list[str] = json.loads(run(project, "-c", _CONVERSATION))
    return found


def talk(alice: list[str], port: int) -> str:
    """Talk to the agent, and return what it says."""
    cookie, session_id = alice
    with connect(
        f"ws://127.0.0.1:{port}/ws/agents/{session_id}/",
        additional_headers={"Cookie": f"sessionid={cookie}"},
        origin=f"http://127.0.0.1:{port}",  # type: ignore[arg-type]
        open_timeout=30,
    ) as tab:
        message = {"id": "u", "role": "user", "content": "Hi"}
        frame = {"threadId": session_id, "runId": f"r-{port}", "messages": [message]}
        tab.send(json.dumps(frame))
        said = ""
        while True:
            event = json.loads(tab.recv(timeout=30))["chunk"]
            said += str(event.get("delta", ""))
            if event["type"] in {"RUN_FINISHED", "RUN_ERROR"}:
                return said


RUNSERVER = ("manage.py", "runserver", "--noreload", "127.0.0.1:{port}")
UVICORN = ("-m", "uvicorn", "mysite.asgi:application", "--port", "{port}")


def test_djangos_own_runserver_serves_no_websocket(
    project: Path, alice: list[str]
) -> None:
    with served(project, *RUNSERVER) as port:
        with pytest.raises(InvalidStatus) as refused:
            talk(alice, port)
        assert refused.value.response.status_code == 404
        assert status(port, CSS) == 200


def test_daphne_first_makes_runserver_serve_both(
    project: Path, alice: list[str]
) -> None:
    [daphne] = [b for b in blocks(_unindented(), "python") if "daphne" in b]
    settings = project / "mysite" / "settings.py"
    before = settings.read_text()
    try:
        settings.write_text(before + daphne)
        with served(project, *RUNSERVER) as port:
            assert talk(alice, port) == "Hello"
            assert status(port, CSS) == 200
    finally:
        settings.write_text(before)


def test_uvicorn_serves_static_files_with_djangos_handler(
    project: Path, alice: list[str]
) -> None:
    with served(project, *UVICORN) as port:
        assert talk(alice, port) == "Hello"
        assert status(port, CSS) == 404
    [handler] = [b for b in blocks(_unindented(), "python") if "ASGIStatic" in b]
    asgi = project / "mysite" / "asgi.py"
    before = asgi.read_text()
    line = "application = get_asgi_application()\n"
    assert line in before
    try:
        asgi.write_text(before.replace(line, handler))
        with served(project, *UVICORN) as port:
            assert talk(alice, port) == "Hello"
            assert status(port, CSS) == 200
    finally:
        asgi.write_text(before)


def _unindented() -> str:
    """Return the section about serving, whose code lies in a list."""
    return section(INSTALL, "Serving it").replace("\n  ", "\n")


def test_the_view_answers(project: Path) -> None:
    ask = textwrap.dedent(
        """
        text = client.post("/ask/", {"text": "Hi"}).json()["answer"]
        from agent_sessions.models import AgentRun
        run = AgentRun.objects.get(session__session_id__startswith="support-")
        print(text, run.status, run.session.item_count)
        """
    )
    code = _CONVERSATION.rpartition("session_id =")[0] + ask
    assert run(project, "-c", code).split() == ["Hello", "completed", "2"]


def test_the_tests_of_the_page_pass(project: Path) -> None:
    append(project, files(section(SESSIONS, "In your tests")))
    run(project, "-m", "pytest", "-q", "--ds=mysite.settings", "test_chat.py")
    settings = project / "mysite" / "settings.py"
    with settings.open("a") as file:
        file.write('TEST_RUNNER = "mysite.runner.Runner"\n')
    (project / "tests.py").write_text(_TEST_CASE)
    said = run(project, "manage.py", "test", "tests")
    assert "Ran 1 test" in said


# The page's own test, as Django's runner wants it.
_TEST_CASE = textwrap.dedent(
    """
    from django.contrib.auth import get_user_model
    from django.test import TransactionTestCase
    from test_chat import test_the_agent_answers


    class ChatTest(TransactionTestCase):
        def test_it(self):
            test_the_agent_answers(get_user_model())
    """
)
