"""A run that another process has is heard, replayed and stopped here, and outlived."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from django.core.cache import cache

from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, get_run_manager
from tests.concurrency.test_processes import another_process
from tests.concurrency.test_processes import layer as layer
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.support.streams import Http, streamed
from tests.websocket.test_consumer import conversation, items_of, speaker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=["with", "without"])
def url(request: pytest.FixtureRequest) -> str:
    """Put a channel layer between the processes, or none."""
    cache.clear()
    return request.getfixturevalue("layer") if request.param == "with" else ""


async def test_a_tab_elsewhere_joins_in_mid_answer(
    url: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with (
        another_process(database_environment, url, session_id, user) as other,
        Socket(session_id, user, agent) as tab,
    ):
        await tab.say("r-1", "Hi")
        await tab.until("TEXT_MESSAGE_CONTENT")
        await other.tell("sync")
        await other.comes_into("r-1")
        model.gate.set()
        told = await tab.to_end()
        events = await other.to_end()
        assert text_of(events) == "one two three four"
        assert events[-1] == told[-1]
        # And from a number, once it has ended.
        frames = [frame for frame in tab.frames if frame["id"].startswith("r-1:")]
        await other.tell(f"sync {frames[2]['id']}")
        assert [await other.frame() for _ in frames[3:]] == frames[3:]


async def test_a_tab_elsewhere_hears_a_run_from_its_start(
    url: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    async with (
        another_process(database_environment, url, session_id, user) as other,
        Socket(session_id, user, speaker("Hello", "again")) as tab,
    ):
        await other.tell("sync")
        await other.to_end()
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            events = await tab.to_end()
            assert await other.to_end() == events


async def test_a_run_is_stopped_from_elsewhere(
    url: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with (
        another_process(database_environment, url, session_id, user) as other,
        Socket(session_id, user, agent) as tab,
    ):
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        # It need not have heard of it. It starts slowly on a machine that is busy.
        await other.tell("abort r-1")
        assert (await tab.to_end(within=60))[-1]["outcome"] == {"type": "cancelled"}
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_stop) == ("idle", "")


async def test_a_run_elsewhere_is_heard_and_stopped_over_http(
    url: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    async with (
        another_process(database_environment, url, session_id, user, "gated") as other,
        Http(session_id, speaker()) as http,
    ):
        await http.login(user)
        await other.tell("say r-1 Hi")
        while (await other.frame())["chunk"]["type"] != "TEXT_MESSAGE_CONTENT":
            pass
        stream = streamed(await http.get("events"))
        await stream.until("RUN_STARTED")
        assert (await http.stop("r-2")).status_code == 404
        assert (await http.stop("r-1")).status_code == 202
        assert (await other.to_end())[-1]["outcome"] == {"type": "cancelled"}
        events = await stream.to_end()
        assert (events[0]["runId"], text_of(events)) == ("r-1", "one two")
        assert events[-1]["outcome"] == {"type": "cancelled"}
        assert (await http.stop("r-1")).status_code == 404


async def test_a_killed_run_is_told_and_its_words_are_kept(
    url: str, database_environment: dict[str, str]
) -> None:
    user, session_id = await conversation()
    async with (
        another_process(database_environment, url, session_id, user, "gated") as other,
        Socket(session_id, user, speaker("fine")) as tab,
    ):
        await tab.sync()
        await tab.to_end()
        await other.tell("say r-1 Hi")
        events = await tab.until("TEXT_MESSAGE_CONTENT", within=30)
        assert events[0]["runId"] == "r-1"
        other.process.send_signal(signal.SIGKILL)
        events += await tab.to_end(within=30)
        assert events[-1]["code"] == "interrupted"
        said = text_of(events)
        assert "one two".startswith(said.strip())
        (snapshot,) = [e for e in events if e["type"] == "MESSAGES_SNAPSHOT"]
        last = snapshot["messages"][-1]
        assert (last["content"], last["metadata"]["stopped"]) == (said, True)
        await tab.say("r-2", "Go on")
        assert text_of(await tab.to_end()) == "fine"
    assert (await AgentRun.objects.aget(run_id="r-1")).status == "interrupted"
    texts: list[Any] = [text for *_, text in await items_of(session_id)]
    assert texts == ["Hi", said, "Go on", "fine"]


async def test_a_run_that_is_heard_elsewhere_goes_on(
    database_environment: dict[str, str],
) -> None:
    cache.clear()
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    rows = AgentSession.objects.filter(session_id=session_id)

    async def heard_after(moment: Any) -> Any:
        async with asyncio.timeout(30):
            while (now := (await rows.aget()).run_listened_at) in {None, moment}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return now

    limits = RunLimits(detach_timeout=0.1)
    async with another_process(database_environment, "", session_id, user) as other:
        async with Socket(session_id, user, agent, limits=limits) as tab:
            await tab.say("r-1", "Hi")
            await model.paused.wait()
            await other.tell("sync")
            await other.comes_into("r-1")
            first = await heard_after(None)
        (run,) = get_run_manager()._runs.values()
        await heard_after(await heard_after(first))
        assert not vars(run)["_abort_mode"]
    async with asyncio.timeout(30):
        while not vars(run)["_abort_mode"]:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)
    model.gate.set()
    assert run.task is not None
    await run.task
