"""Two server processes with a real channel layer between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.core.cache import cache

from agent_sessions.models import AgentRun, AgentSession
from tests.runs.test_runs import approve, cashier, refused
from tests.servers import Server
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, items_of

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def layer(valkey_server: Server, settings: Any) -> str:
    """Put Valkey between the processes; give its URL."""
    url = f"redis://{valkey_server.host}:{valkey_server.port}/0"
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {"hosts": [{"address": url, "socket_timeout": None}]},
        }
    }
    cache.clear()
    return url


class Other:
    """The other process's tab."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def frame(self) -> dict[str, Any]:
        assert self.process.stdout
        async with asyncio.timeout(30):
            line = await self.process.stdout.readline()
        assert line, "the other process ended"
        frame: dict[str, Any] = json.loads(line)
        return frame

    async def comes_into(self, run_id: str) -> None:
        """Pass where a run of the first process is shown as running."""
        started = (await self.frame())["chunk"]
        assert (started["type"], started["runId"]) == ("RUN_STARTED", run_id)
        assert (await self.frame())["chunk"]["type"] == "MESSAGES_SNAPSHOT"

    async def to_end(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in {"RUN_FINISHED", "RUN_ERROR"}:
            events.append((await self.frame())["chunk"])
        return events


@asynccontextmanager
async def another_process(
    environment: dict[str, str], url: str, session_id: str, user: Any, *kind: str
) -> AsyncIterator[Other]:
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "tests.support.other_process",
            session_id,
            str(user.pk),
            *kind,
        ),
        env=environment | ({"AGENT_SESSIONS_TEST_LAYER": url} if url else {}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Other(process)
    finally:
        assert process.stdin
        # It may have been killed.
        with contextlib.suppress(ConnectionError):
            process.stdin.close()
        async with asyncio.timeout(20):
            await process.wait()


async def test_tabs_of_two_processes_hear_the_same(
    layer: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    model.gate.set()
    async with (
        another_process(database_environment, layer, session_id, user) as other,
        Socket(session_id, user, agent) as tab,
    ):
        await other.tell("sync")
        await other.to_end()
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
        assert text_of(events) == "one two three"
        assert await other.to_end() == events


async def test_a_run_is_stopped_and_guarded_from_the_other_process(
    layer: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with (
        another_process(database_environment, layer, session_id, user) as other,
        Socket(session_id, user, agent) as tab,
    ):
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await other.tell("sync")
        await other.comes_into("r-1")
        await other.tell("say r-2 Me too")
        events = await other.to_end()
        assert events.pop()["code"] == "session_busy"
        await other.tell("abort r-1")
        assert (await tab.to_end())[-1]["outcome"] == {"type": "cancelled"}
        events += await other.to_end()
        assert text_of(events) == "one two"
        assert events[-1]["outcome"] == {"type": "cancelled"}
        await other.tell("sync")
        await other.to_end()
    row = await AgentSession.objects.aget(session_id=session_id)
    assert row.state == "idle"
    assert (await AgentRun.objects.aget(run_id="r-1")).status == "cancelled"


async def test_a_revoked_tab_of_the_other_process_stops_nothing(
    layer: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    # This tab asks no more who is there: the run is to be heard to its end.
    patient: Any = {"recheck_after": 1_000, "recheck_interval": 1_000}
    async with (
        another_process(database_environment, layer, session_id, user) as other,
        Socket(session_id, user, agent, **patient) as tab,
    ):
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await other.tell("sync")
        await other.comes_into("r-1")
        user.is_active = False
        await user.asave()
        await other.tell("abort r-1")
        while "closed" not in (frame := await other.frame()):
            # What was said before.
            assert frame["id"].startswith("r-1:")
        assert frame == {"closed": 4401}
        model.gate.set()
        assert text_of(await tab.to_end()) == "one two three"
    assert (await AgentRun.objects.aget(run_id="r-1")).status == "completed"


async def test_an_approval_is_carried_out_by_one_of_two_processes(
    layer: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    async with (
        another_process(database_environment, layer, session_id, user) as other,
        Socket(session_id, user, cashier()) as tab,
    ):
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await other.tell("sync")
        assert (await other.to_end())[-1]["outcome"]["type"] == "interrupt"
        await asyncio.gather(
            tab.answer("r-here", approve()), other.tell("approve r-there call_1")
        )
        code = await refused(tab, "r-here")
        events = await other.to_end()
        assert (code is None) or code in {"session_busy", "unknown_interrupt"}
        # Refused here or there; both hear the one run to its end.
        while events[-1].get("code"):
            events = await other.to_end()
        assert text_of(events) == "done"
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == ["message", "function_call", "function_call_output", "message"]
    ran = [run.run_id async for run in AgentRun.objects.order_by("pk")]
    assert ran in (["r-1", "r-here"], ["r-1", "r-there"])
