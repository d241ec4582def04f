"""What clients are told if hooks fail or the database is away, and when a lease ends."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from agents import Agent, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.db import OperationalError

from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits
from tests.settings import DATABASE_KIND
from tests.support.away import database_away
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.support.usages import agent, say
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


HOOKS = ("get_agent", "get_context", "get_run_config", "get_hooks", "check_rate")


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_that_raises_is_told_as_internal(hook: str) -> None:
    def broken(self: Any) -> Any:
        raise LookupError("private words")

    failing = type("Failing", (AgentConsumer,), {hook: broken})
    user, session_id = await conversation()
    async with Socket(session_id, user, agent(say("Hi")), consumer=failing) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            chunk = (await tab.frame())["chunk"]
            assert (chunk["type"], chunk["code"]) == ("RUN_ERROR", "internal")
            assert chunk["metadata"] == {"runId": run_id}
            assert "private" not in chunk["message"]
        # The socket is as good as before.
        await tab.sync()
        assert (await tab.to_end())[-1]["outcome"] == {"type": "success"}
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_id) == ("idle", "")


async def test_an_agent_that_is_none_is_told_as_internal() -> None:
    class Without(AgentConsumer):
        def get_agent(self) -> Any:
            return None

    user, session_id = await conversation()
    async with Socket(session_id, user, None, consumer=Without) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.frame())["chunk"]["code"] == "internal"


async def test_a_hook_whose_database_is_away_closes_with_4503() -> None:
    class Asking(AgentConsumer):
        def get_agent(self) -> Any:
            raise OperationalError("away")

    user, session_id = await conversation()
    async with Socket(session_id, user, None, consumer=Asking) as tab:
        await tab.say("r-1", "Hi")
        assert await tab.closed() == 4503


async def test_a_database_that_is_away_at_connect_closes_with_4503() -> None:
    user, session_id = await conversation()
    with database_away():
        async with Socket(session_id, user, agent(say("Hi"))) as tab:
            assert await tab.closed() == 4503


@pytest.mark.parametrize("frame", ["run", "sync"])
async def test_a_database_that_is_away_at_a_frame_closes_with_4503(frame: str) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, agent(say("Hi"))) as tab:
        await tab.sync()
        await tab.to_end()
        with database_away():
            await (tab.say("r-1", "Hi") if frame == "run" else tab.sync())
            assert await tab.closed() == 4503


async def ends_late(**ending: Any) -> tuple[list[Any], AgentRun]:
    """End a run while the database is away; return its events and row."""
    user, session_id = await conversation()
    speaker, model = gated("Hello you", pause_at=1)
    options: Any = {"recheck_after": 60}
    async with Socket(session_id, user, speaker, **options) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        if "abort" in ending:
            # Asked before: a frame asks who is there.
            await tab.send({"type": "abort", "runId": "r-1", "mode": "after_turn"})
            await asyncio.sleep(0.2)
        with database_away():
            model.gate.set()
            events = await tab.to_end()
        row = sync_to_async(AgentSession.objects.get)
        async with asyncio.timeout(10):
            while (await row(session_id=session_id)).run_id:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    return events, await AgentRun.objects.aget(run_id="r-1")


async def test_an_end_that_cannot_be_written_is_told_and_written_later() -> None:
    events, run = await ends_late()
    assert (events[-1]["type"], events[-1]["code"]) == ("RUN_ERROR", "internal")
    assert run.status in {"completed", "failed"}
    assert run.finished_at is not None


async def test_the_session_can_be_written_to_once_the_database_is_back() -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello you", pause_at=1)
    async with Socket(session_id, user, speaker, recheck_after=60) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        with database_away():
            model.gate.set()
            assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        async with asyncio.timeout(10):
            code = "session_busy"
            number = 1
            while code == "session_busy":
                number += 1
                await asyncio.sleep(0.2)
                await tab.say(f"r-{number}", "Hi")
                code = (await tab.frame())["chunk"].get("code", "")
        assert text_of(await tab.to_end()) == "Hello you"


async def test_heartbeats_survive_a_database_that_is_away() -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello you", pause_at=1)
    limits = RunLimits(heartbeat=0.1, stale_after=0.8)
    async with Socket(
        session_id, user, speaker, limits=limits, recheck_after=60
    ) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        with database_away():
            await asyncio.sleep(0.4)
        await asyncio.sleep(1)
        async with Socket(session_id, user, speaker, limits=limits) as other:
            await other.say("r-2", "Hi")
            assert (await other.frame())["chunk"]["code"] == "session_busy"
        model.gate.set()
        assert text_of(await tab.to_end()) == "Hello you"


@pytest.mark.skipif(DATABASE_KIND == "sqlite", reason="in memory: one connection")
async def test_a_tool_that_blocks_the_loop_keeps_the_lease() -> None:
    seen: list[Any] = []
    user, session_id = await conversation()
    limits = RunLimits(heartbeat=0.2, stale_after=1)

    @function_tool
    async def block() -> str:
        """Block the event loop."""
        time.sleep(2)  # noqa: ASYNC251 - that is the fault
        row = AgentSession.objects.filter(session_id=session_id)
        seen.append(await row.values_list("run_id", "run_seen_at").aget())
        return "done"

    model = ScriptedModel(
        [[function_call("block", {}, call_id="call_1")], [assistant_message("ok")]]
    )
    blocking = Agent(name="a", model=model, tools=[block])
    async with Socket(session_id, user, blocking, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        begun = time.time()
        assert text_of(await tab.to_end(within=10)) == "ok"
    [(run_id, moment)] = seen
    assert run_id == "r-1"
    assert moment.timestamp() > begun + 1
