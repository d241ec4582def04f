"""AgentRunView: runs over HTTP, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from agents import Agent
from agents.testing import ScriptedModel, assistant_message, function_call
from django.core.cache import cache
from django.core.handlers.asgi import ASGIHandler

from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun
from agent_sessions.runs import RunLimits, get_run_manager
from agent_sessions.runs.setup import Conversation
from agent_sessions.streams import AgentRunView
from tests.support.approvals import refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.documents import blocks, page
from tests.support.gated import gated
from tests.support.streams import Http
from tests.websocket.test_consumer import conversation, items_of, speaker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


async def listeners(user: Any, session_id: str) -> int:
    found = await Conversation.find(session_id, user=user)
    return get_run_manager().listeners(found)


# -- runs ------------------------------------------------------------------------------


async def test_a_run_is_streamed_and_stored() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("Hello there")) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        events = await stream.to_end()
    assert events[0]["input"]["messages"][0]["content"] == "Hi"
    assert text_of(events) == "Hello there"
    assert events[-1]["outcome"] == {"type": "success"}
    assert stream.ids == [f"r-1:{n}" for n in range(1, len(events) + 1)]
    assert [role for _, role, _ in await items_of(session_id)] == ["user", "assistant"]
    assert stream.response["X-Accel-Buffering"] == "no"
    assert "no-store" in stream.response["Cache-Control"]


async def test_an_id_that_was_used_is_told_again_and_not_run_again() -> None:
    user, session_id = await conversation()
    agent = speaker("one", "two")
    async with Http(session_id, agent) as http:
        await http.login(user)
        first = await (await http.run("r-1", "Hi")).to_end()
        again = await (await http.run("r-1", "Hi")).to_end()
    assert first == again
    assert await AgentRun.objects.acount() == 1


async def test_what_was_missed_follows_the_last_event_exactly() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four five six", pause_at=3)
    async with Http(session_id, agent, limits=RunLimits(merge_interval=0)) as http:
        await http.login(user)
        first = await http.run("r-1", "Hi")
        await first.until("TEXT_MESSAGE_CONTENT")
        await first.close()
        assert await listeners(user, session_id) == 0
        await model.paused.wait()
        model.gate.set()
        last = first.ids[-1] or ""
        response: Any = await http.get("events", last=last)
        rest = b"".join([part async for part in response]).decode()
    told = first.events + [
        json.loads(block.split("data: ")[1]) for block in rest.split("\n\n") if block
    ]
    assert text_of(told) == "one two three four five six"
    assert told[-1]["outcome"] == {"type": "success"}
    ids = [line[4:] for line in rest.split("\n") if line.startswith("id: ")]
    assert [*first.ids, *ids] == [f"r-1:{n}" for n in range(1, len(told) + 1)]
    assert len(model.calls) == 1


async def test_a_run_that_goes_on_is_joined_from_its_start() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent) as http:
        await http.login(user)
        first = await http.run("r-1", "Hi")
        await model.paused.wait()
        second = await http.events()
        assert (await second.until("RUN_STARTED"))["runId"] == "r-1"
        model.gate.set()
        assert text_of(await second.to_end()) == "one two three"
        assert text_of(await first.to_end()) == "one two three"


async def test_a_conversation_at_rest_is_a_snapshot() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("Hello")) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        await stream.to_end()
        events = await (await http.events()).to_end()
        kinds = [event["type"] for event in events]
        assert kinds == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]
        assert [m["content"] for m in events[1]["messages"]] == ["Hi", "Hello"]
        # Whoever has heard all is told so: an EventSource stops.
        heard = await http.get("events", offset=stream.ids[-1] or "")
        assert heard.status_code == 204
        fresh = await (await http.events(offset="no-such-run:3")).to_end()
        assert [event["type"] for event in fresh] == kinds


async def test_an_approval_is_answered() -> None:
    user, session_id = await conversation()
    calls = [function_call("refund", {"order": "42"}, call_id="call_1")]
    model = ScriptedModel([calls, [assistant_message("Done.")]])
    agent = Agent(name="Support", model=model, tools=[refund])
    async with Http(session_id, agent) as http:
        await http.login(user)
        events = await (await http.run("r-1", "Refund order 42")).to_end()
        [asked] = events[-1]["outcome"]["interrupts"]
        entry = {"interruptId": asked["id"], "status": "resolved"}
        approved = {**entry, "payload": {"approved": True}}
        # A client of AG-UI sends its whole history along.
        history = [{"id": "u-1", "role": "user", "content": "Refund order 42"}]
        stream = await http.send(runId="r-2", messages=history, resume=[approved])
        events = await stream.to_end()
    assert text_of(events) == "Done."
    assert refunded == ["42"]


async def test_a_socket_and_a_stream_hear_the_same_run() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with (
        Http(session_id, agent) as http,
        Socket(session_id, user, agent) as tab,
    ):
        await http.login(user)
        await tab.sync()
        await tab.to_end()
        stream = await http.run("r-1", "Hi")
        await model.paused.wait()
        model.gate.set()
        assert await stream.to_end() == await tab.to_end()
        model.gate.clear()
        await tab.say("r-2", "And you?")
        await tab.until("TEXT_MESSAGE_START")
        joined = await http.events()
        await joined.until("TEXT_MESSAGE_START")
        model.gate.set()
        await tab.to_end()
        assert text_of(await joined.to_end()) == "one two three"


# -- stopping and leaving --------------------------------------------------------------


async def test_a_run_is_stopped() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent) as http:
        await http.login(user)
        stream = await http.run("a/b c", "Hi")
        await model.paused.wait()
        assert (await http.stop("other")).status_code == 404
        assert (await http.stop("a/b c", mode="never")).status_code == 400
        answer = await http.stop("a/b c")
        assert answer.status_code == 202
        events = await stream.to_end()
        assert events[-1]["outcome"] == {"type": "cancelled"}
        assert (await http.stop("a/b c")).status_code == 404


async def test_a_stream_that_closes_ends_no_run() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent, max_sockets=1) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        await stream.until("TEXT_MESSAGE_START")
        assert await listeners(user, session_id) == 1
        await stream.close()
        assert await listeners(user, session_id) == 0
        joined = await http.events()
        await joined.until("TEXT_MESSAGE_START")
        model.gate.set()
        assert text_of(await joined.to_end()) == "one two three"
    run = await AgentRun.objects.aget(run_id="r-1")
    assert run.status == "completed"


async def test_an_answer_that_nobody_reads_leaves_no_listener() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent, limits=RunLimits(detach_timeout=0)) as http:
        await http.login(user)
        response = await http.post(
            "runs",
            {
                "threadId": session_id,
                "runId": "r-1",
                "messages": [{"id": "u", "role": "user", "content": "Hi"}],
            },
        )
        assert await listeners(user, session_id) == 0
        response.close()
        model.gate.set()
        run = get_run_manager().active(await Conversation.find(session_id, user=user))
        if run is not None and run.task is not None:
            await run.task
    row = await AgentRun.objects.aget(run_id="r-1")
    assert row.finished_at is not None


async def test_the_newest_streams_have_the_seats() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent, max_sockets=1) as http:
        await http.login(user)
        first = await http.run("r-1", "Hi")
        await first.until("TEXT_MESSAGE_START")
        second = await http.events()
        await second.until("TEXT_MESSAGE_START")
        events = await first.to_end()
        assert events[-1]["code"] == "rate_limited"
        model.gate.set()
        assert text_of(await second.to_end()) == "one two three"


async def test_a_comment_breaks_the_silence() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Http(session_id, agent, comment_interval=0.05) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        reading = asyncio.create_task(stream.to_end())
        while not stream.comments:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        model.gate.set()
        assert text_of(await reading) == "one two three"


async def test_a_mixin_serves_both() -> None:
    """The example of docs/server-sent-events.md."""
    codes = blocks(page("docs/server-sent-events.md"), "python")
    [code] = [each for each in codes if "AgentMixin" in each]
    names: dict[str, Any] = {
        "support_agent": speaker("one", "two"),
        "AgentConsumer": AgentConsumer,
        "AgentRunView": AgentRunView,
    }
    exec(code, names)
    user, session_id = await conversation()
    agent, consumer = names["support_agent"], names["SupportConsumer"]
    async with (
        Http(session_id, agent, view=names["SupportRuns"]) as http,
        Socket(session_id, user, agent, consumer=consumer) as tab,
    ):
        await http.login(user)
        assert text_of(await (await http.run("r-1", "Hi")).to_end()) == "one"
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "two"


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """Serve Django with uvicorn on this loop; give the port."""
    config = uvicorn.Config(ASGIHandler(), port=0, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


@pytest.mark.parametrize("reads", [True, False])
async def test_a_real_server_tells_when_a_client_has_gone(reads: bool) -> None:
    user, session_id = await conversation()
    agent, model = gated(" ".join(["word" * 2000] * 400), pause_at=2 if reads else 300)
    limits = RunLimits(merge_interval=0)
    async with Http(session_id, agent, limits=limits) as http, served() as port:
        await http.login(user)
        token = "a" * 32
        http.client.cookies["csrftoken"] = token
        cookies = [f"{name}={each.value}" for name, each in http.client.cookies.items()]
        message = {"id": "u-1", "role": "user", "content": "Hi"}
        body = {"threadId": session_id, "runId": "r-1", "messages": [message]}
        lines = [
            f"POST {http.address('runs')} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Cookie: {'; '.join(cookies)}",
            f"X-CSRFToken: {token}",
            f"Content-Length: {len(json.dumps(body))}",
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join([*lines, "", json.dumps(body)]).encode())
        assert b"200 OK" in await reader.readline()
        await model.paused.wait()
        assert await listeners(user, session_id) == 1
        writer.transport.abort()
        async with asyncio.timeout(10):
            while await listeners(user, session_id):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        run = get_run_manager().active(await Conversation.find(session_id, user=user))
        assert run is not None
        assert run.task is not None
        run.abort()
        await run.task
