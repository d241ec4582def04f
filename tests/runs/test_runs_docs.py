"""The examples of docs/runs.md."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from channels.routing import ProtocolTypeRouter
from django.db import connections

from agent_sessions import get_session
from agent_sessions.models import AgentRun
from agent_sessions.signals import run_finished
from tests.support.chat import make_user
from tests.support.documents import blocks, page, section

pytestmark = pytest.mark.django_db(transaction=True)

RUNS = page("docs/runs.md")


def code_of(title: str, number: int = 0) -> str:
    return blocks(section(RUNS, title), "python")[number]


def names_of(code: str, **names: Any) -> dict[str, Any]:
    """Run a block, with an agent that answers once, and return what it defines."""
    model = ScriptedModel([[assistant_message("Good day")]])
    names["support_agent"] = Agent(name="Support", model=model)
    exec(code, names)
    return names


async def items(user: Any) -> list[Any]:
    found: list[Any] = await get_session("s-1", user=user).get_items()
    return [item["role"] for item in found]


async def test_a_run_that_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    user = await sync_to_async(make_user)()
    names = names_of(code_of("Runs that you start"))
    assert await names["answer"](user, "Hello") == "Good day"
    told = capsys.readouterr().out.split()
    assert (told[0], told[-1]) == ("RUN_STARTED", "RUN_FINISHED")
    assert await items(user) == ["user", "assistant"]


def test_a_run_of_a_task() -> None:
    user = make_user()
    names = names_of(code_of("Runs that you start", 2))
    assert names["answer_in_task"](user, "Hello") == "Good day"
    connections.close_all()


async def test_a_session_that_is_held() -> None:
    user = await sync_to_async(make_user)()
    names = names_of(code_of("Holding a session"))
    assert await names["ask"](user, "Hello") == "Good day"
    assert await items(user) == ["user", "assistant"]
    assert (await AgentRun.objects.aget()).status == "completed"


async def test_an_application_that_is_stopped() -> None:
    names = names_of(code_of("Stopping a server"), http=None, websocket=None)
    assert callable(names["application"])
    assert not isinstance(names["application"], ProtocolTypeRouter)


async def test_a_count_for_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def metric(name: str, help: str, labels: list[str]) -> Any:
        def of(*values: str) -> Any:
            about = name, dict(zip(labels, values, strict=True))
            return SimpleNamespace(
                inc=lambda: counted.append(about),
                observe=lambda seconds: counted.append((*about, seconds)),
            )

        return SimpleNamespace(labels=of)

    library = SimpleNamespace(Counter=metric, Histogram=metric)
    monkeypatch.setitem(sys.modules, "prometheus_client", library)
    names = names_of(code_of("Signals, traces and metrics"))
    try:
        started = names_of(code_of("Runs that you start"))
        await started["answer"](None, "Hello")
    finally:
        run_finished.disconnect(names["count_run"])
    ended = {"backend": "default", "status": "completed", "error_code": ""}
    assert counted[0] == ("agent_runs", ended)
    assert counted[1][:2] == ("agent_run_seconds", {"backend": "default"})
