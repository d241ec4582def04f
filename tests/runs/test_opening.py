"""open_run(): what a run opens for itself is closed when it ends, however it does."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache

from agent_sessions.agui import RunRequest
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun
from agent_sessions.runs import RunLimits, get_run_manager
from tests.runs.test_runs import approve
from tests.support.approvals import refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.documents import blocks, page
from tests.support.gated import gated
from tests.support.ratelimits import early_in_the_minute
from tests.websocket.test_consumer import conversation, speaker

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]

[EXAMPLE] = [b for b in blocks(page("docs/websocket.md"), "python") if "open_run" in b]
SERVER = """
import os, sys
from pathlib import Path
from mcp.server.mcpserver import MCPServer

Path(sys.argv[1]).write_text(str(os.getpid()))
server = MCPServer("orders")

@server.tool()
def find_order(number: str) -> str:
    "Find an order."
    return f"order {number} is on its way"

server.run()
"""


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


class Opening(AgentConsumer):
    """Writes down what it opens and how that is closed."""

    log: list[str] = []

    @asynccontextmanager
    async def open_run(self, request: RunRequest) -> AsyncIterator[Any]:
        self.log.append(f"open {request.run_id}")
        try:
            yield None
        except BaseException as exc:
            self.log.append(f"{type(exc).__name__} {request.run_id}")
            raise
        else:
            self.log.append(f"close {request.run_id}")


async def status_of(run_id: str) -> str:
    return (await AgentRun.objects.aget(run_id=run_id)).status


def pid_in(file: Path) -> int:
    return int(file.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def pid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server of the docs, which is made here, writes its process."""
    monkeypatch.chdir(tmp_path)
    pid_file = tmp_path / "pid"
    code = SERVER.replace("sys.argv[1]", repr(str(pid_file)))
    (tmp_path / "orders_server.py").write_text(code)
    return pid_file


async def test_the_server_of_the_docs_lives_as_long_as_the_run(pid_file: Path) -> None:
    model = ScriptedModel(
        [
            [function_call("find_order", {"number": "41"}, call_id="call_1")],
            [assistant_message("It is on its way.")],
        ]
    )
    names: dict[str, Any] = {
        "AgentConsumer": AgentConsumer,
        "support_agent": Agent(name="Support", model=model),
    }
    exec(EXAMPLE, names)
    user, session_id = await conversation()
    kind = names["SupportConsumer"]
    async with Socket(session_id, user, kind.agent, consumer=kind) as tab:
        await tab.say("r-1", "Where is order 41?")
        events = await tab.to_end(within=30)
    assert text_of(events) == "It is on its way."
    assert events[-1]["outcome"] == {"type": "success"}
    given = str(model.calls[1].input)
    assert "order 41 is on its way" in given
    assert not is_alive(pid_in(pid_file))


async def test_a_refused_run_opens_nothing() -> None:
    early_in_the_minute()
    user, session_id = await conversation()
    agent, model = gated("Hello there, you")
    log: list[str] = []
    tab = Socket(
        session_id, user, agent, consumer=Opening, log=log, max_runs_per_minute=2
    )
    async with tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.say("r-2", "Me too")
        await tab.until("RUN_ERROR")
        await tab.say("r-3", "And me")
        codes = [(await tab.until("RUN_ERROR"))[-1]["code"]]
        assert codes == ["rate_limited"]
        model.gate.set()
        await tab.to_end()
    assert log == ["open r-1", "close r-1"]


async def test_it_closes_after_a_stop() -> None:
    user, session_id = await conversation()
    agent, model = gated("Hello there, you")
    log: list[str] = []
    async with Socket(session_id, user, agent, consumer=Opening, log=log) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "cancelled"}
    assert log == ["open r-1", "close r-1"]


async def test_it_closes_after_a_failure_and_hears_of_it() -> None:
    user, session_id = await conversation()
    agent = Agent(name="broken", model=ScriptedModel([ValueError("no")]))
    log: list[str] = []
    async with Socket(session_id, user, agent, consumer=Opening, log=log) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "internal"
    assert log == ["open r-1", "ValueError r-1"]


async def test_it_closes_after_a_time_out() -> None:
    user, session_id = await conversation()
    agent, _model = gated("Hello there, you")
    log: list[str] = []
    limits = RunLimits(run_timeout=0.3)
    tab = Socket(session_id, user, agent, consumer=Opening, log=log, limits=limits)
    async with tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "timeout"
    assert log == ["open r-1", "CancelledError r-1"]


async def test_it_closes_as_the_server_goes_down() -> None:
    user, session_id = await conversation()
    agent, model = gated("Hello there, you")
    log: list[str] = []
    options: dict[str, Any] = {"consumer": Opening, "limits": RunLimits(grace=0)}
    async with Socket(session_id, user, agent, log=log, **options) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await get_run_manager().shutdown()
        await tab.to_end()
    assert log == ["open r-1", "CancelledError r-1"]
    assert await status_of("r-1") == "interrupted"


async def test_a_paused_run_goes_on_with_what_is_opened_anew() -> None:
    log: list[str] = []

    class Late(Opening):
        @asynccontextmanager
        async def open_run(self, request: RunRequest) -> AsyncIterator[Any]:
            async with super().open_run(request):
                yield {"agent": self.get_agent().clone(tools=[refund])}

    model = ScriptedModel(
        [
            [function_call("refund", {"order": "42"}, call_id="call_1")],
            [assistant_message("Done.")],
        ]
    )
    user, session_id = await conversation()
    agent = Agent(name="Support", model=model)
    async with Socket(session_id, user, agent, consumer=Late, log=log) as tab:
        await tab.say("r-1", "Refund order 42")
        events = await tab.to_end()
        assert events[-1]["outcome"]["type"] == "interrupt"
        assert log == ["open r-1", "close r-1"]
        await tab.answer("r-2", approve())
        events = await tab.to_end()
    assert text_of(events) == "Done.", events
    assert refunded == ["42"]
    assert log == ["open r-1", "close r-1", "open r-2", "close r-2"]


async def test_what_it_gives_takes_the_place_of_the_hooks() -> None:
    seen: list[Any] = []

    async def instructions(context: Any, agent: Any) -> str:
        seen.append(context.context)
        return "Be kind."

    class Changing(AgentConsumer):
        @asynccontextmanager
        async def open_run(self, request: RunRequest) -> AsyncIterator[Any]:
            agent = speaker("from the opened one").clone(instructions=instructions)
            yield {"agent": agent, "context": {"tenant": "a"}}

    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("x"), consumer=Changing) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "from the opened one"
    assert seen == [{"tenant": "a"}]


async def refuse_to_open(request: RunRequest) -> AsyncIterator[None]:
    if request.run_id:
        raise OSError("no server")
    yield


async def give_what_is_no_field(request: RunRequest) -> AsyncIterator[Any]:
    yield {"agents": None}


async def give_no_dict(request: RunRequest) -> AsyncIterator[Any]:
    yield Agent(name="A")


async def test_an_approval_that_the_opened_agent_cant_resume_is_outdated() -> None:
    agents = [Agent(name="Support", tools=[refund]), Agent(name="Support")]

    @asynccontextmanager
    async def hook(request: RunRequest) -> AsyncIterator[Any]:
        yield {"agent": agents.pop(0).clone(model=model)}

    calls = [function_call("refund", {"order": "42"}, call_id="call_1")]
    model = ScriptedModel([calls, [assistant_message("Done.")]])
    user, session_id = await conversation()
    agent = Agent(name="Support", model=model)
    async with Socket(session_id, user, agent, open_run=hook) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-2", approve())
        events = await tab.to_end()
        assert events[-1]["code"] == "outdated_approval"
        agents.append(Agent(name="Support"))
        await tab.say("r-3", "Hello?")
        assert text_of(await tab.to_end()) == "Done."
    assert refunded == []


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (asynccontextmanager(refuse_to_open), "OSError"),
        (asynccontextmanager(give_what_is_no_field), "Did you mean 'agent'?"),
        (asynccontextmanager(give_no_dict), "yields a dict or None, not a Agent"),
        (refuse_to_open, "@contextlib.asynccontextmanager"),
    ],
    ids=["error", "name", "type", "generator"],
)
async def test_what_cant_be_opened_fails_the_run(
    hook: Any, words: str, caplog: pytest.LogCaptureFixture, settings: Any
) -> None:
    settings.AGENT_SESSIONS_LOG_TRACEBACKS = True
    user, session_id = await conversation()
    caplog.set_level(logging.WARNING)
    async with Socket(session_id, user, speaker("x"), open_run=hook) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
        assert events[-1]["code"] == "internal"
        assert await status_of("r-1") == "failed"
        assert words in caplog.text
        # The session is free.
        await tab.say("r-2", "Hi")
        await tab.to_end()
    assert await status_of("r-2") == "failed"


async def test_what_fails_to_close_is_logged_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @asynccontextmanager
    async def hook(request: RunRequest) -> AsyncIterator[None]:
        yield
        raise OSError("secret")

    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one"), open_run=hook) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert text_of(events) == "one"
    assert events[-1]["outcome"] == {"type": "success"}
    assert "open_run() of run 'r-1' could not close (OSError)" in caplog.text
    assert "secret" not in caplog.text


async def test_what_never_closes_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_sessions.runs.opening.HOOK_SECONDS", 0.1)

    @asynccontextmanager
    async def hook(request: RunRequest) -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one"), open_run=hook) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "success"}
