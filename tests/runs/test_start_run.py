"""Runs that plain code starts: a view, a command, a task."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, ModelBehaviorError, RunConfig, RunHooks
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import cache
from django.db import connections
from django.utils import timezone

from agent_sessions import get_session
from agent_sessions.exceptions import (
    BlockingCall,
    RunFailed,
    RunPaused,
    RunStopped,
    SessionBusy,
    SessionDoesNotExist,
)
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import (
    RunLimits,
    SyncRun,
    get_run_manager,
    start_run,
    start_run_sync,
)
from tests.runs.test_runs import cashier
from tests.support.agui_validator import SequenceChecker
from tests.support.chat import Socket, make_user, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def speaker(*answers: Any, **options: Any) -> Agent[Any]:
    model = ScriptedModel([[assistant_message(text)] for text in answers])
    return Agent(name="speaker", model=model, **options)


async def row(run_id: str) -> AgentRun:
    return await AgentRun.objects.select_related("session").aget(run_id=run_id)


async def test_a_run_is_started_heard_and_waited_for() -> None:
    user = await sync_to_async(make_user)()
    run = await start_run(speaker("Good day"), "Hello", session_id="s", user=user)
    checker, events = SequenceChecker(), []
    async for event in run.events():
        checker.feed(event)
        events.append(event)
    assert (events[0]["type"], events[-1]["type"]) == ("RUN_STARTED", "RUN_FINISHED")
    assert text_of(events) == "Good day"
    assert await run.result() == "Good day"
    # Again, after its end.
    assert [event async for event in run.events()] == events
    found = await row(run.run_id)
    assert (found.status, found.agent_name) == ("completed", "speaker")
    assert (found.session.user_id, found.session.state) == (user.pk, "idle")
    items: list[Any] = await get_session("s", user=user).get_items()
    assert [item["role"] for item in items] == ["user", "assistant"]


async def test_an_open_tab_sees_the_run_and_stops_it() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.sync()
        await tab.to_end()
        run = await start_run(agent, "Hello", session_id=session_id, user=user)
        await tab.until("TEXT_MESSAGE_CONTENT")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": run.run_id})
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "cancelled"}
    with pytest.raises(RunStopped) as stopped:
        await run.result()
    assert (stopped.value.run_id, stopped.value.code) == (run.run_id, "cancelled")


async def test_stop_waits_until_the_session_is_free() -> None:
    agent, model = gated("one two three")
    run = await start_run(agent, "Hello", session_id="s")
    await model.paused.wait()
    await run.stop()
    found = await row(run.run_id)
    assert (found.status, found.session.state) == ("cancelled", "idle")


async def test_a_run_without_listeners_goes_on() -> None:
    agent, model = gated("one two three")
    limits = RunLimits(detach_timeout=0)
    run = await start_run(agent, "Hello", session_id="s", limits=limits)
    await model.paused.wait()
    events = run.events()
    await anext(events)
    await events.aclose()
    model.gate.set()
    assert await run.result() == "one two three"


async def test_a_failure_has_its_code_and_no_contents() -> None:
    class Broken(ScriptedModel):
        async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise ModelBehaviorError("secret words")
            yield

    agent: Agent[Any] = Agent(name="speaker", model=Broken([]))
    run = await start_run(agent, "Hello", session_id="s")
    with pytest.raises(RunFailed) as failed:
        await run.result()
    assert (failed.value.run_id, failed.value.code) == (run.run_id, "model_error")
    assert "secret" not in str(failed.value)
    assert failed.value.__cause__ is None


async def test_a_run_that_waits_for_an_approval_says_so() -> None:
    run = await start_run(cashier(), "Refund it", session_id="s")
    with pytest.raises(RunPaused) as paused:
        await run.result()
    (asked,) = paused.value.interrupts
    assert asked["metadata"]["toolName"] == "refund"
    assert paused.value.run_id == run.run_id


async def test_a_busy_session_is_waited_for() -> None:
    agent, model = gated("one two three")
    first = await start_run(agent, "Hello", session_id="s")
    await model.paused.wait()
    with pytest.raises(SessionBusy) as busy:
        await start_run(speaker("no"), "Hello", session_id="s", wait=0.1)
    assert busy.value.run_id == first.run_id
    waiting = asyncio.create_task(
        start_run(speaker("yes"), "Hello", session_id="s", wait=60)
    )
    model.gate.set()
    second = await waiting
    assert await second.result() == "yes"
    assert await first.result() == "one two three"


async def test_whoever_is_cancelled_while_it_starts_leaves_the_session_free() -> None:
    await get_session("s").add_items([{"role": "user", "content": "Hi"}])
    for steps in range(0, 30, 3):
        begun = asyncio.create_task(start_run(speaker("a"), "b", session_id="s"))
        for _ in range(steps):
            await asyncio.sleep(0)
        begun.cancel()
        await asyncio.wait({begun})
        if not begun.cancelled():
            await begun.result().result()
        assert (await AgentSession.objects.aget()).run_id == ""


async def test_someone_elses_session_is_not_there() -> None:
    user, session_id = await conversation()
    other = await sync_to_async(make_user)()
    with pytest.raises(SessionDoesNotExist):
        await start_run(speaker("a"), "b", session_id=session_id, user=other)
    assert await AgentRun.objects.acount() == 0
    assert user.pk != other.pk


async def test_the_options_reach_the_runner() -> None:
    heard: list[Any] = []

    class Hooks(RunHooks[Any]):
        async def on_agent_start(self, context: Any, agent: Any) -> None:
            heard.append(context.context)

    model = ScriptedModel([[assistant_message("from the config")]])
    run = await start_run(
        speaker("from the agent"),
        "Hello",
        session_id="s",
        backend="default",
        context={"plan": "gold"},
        run_config=RunConfig(model=model),
        hooks=Hooks(),
        max_turns=3,
    )
    assert await run.result() == "from the config"
    assert heard == [{"plan": "gold"}]


# -- synchronous code ------------------------------------------------------------------


@pytest.fixture
def closing() -> Iterator[None]:
    yield
    connections.close_all()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "agent_sessions-runs"]


def assert_gone() -> None:
    until = time.monotonic() + 30
    while threads() and time.monotonic() < until:
        time.sleep(0.02)
    assert not threads()


def test_the_thread_ends_with_the_last_run(closing: None) -> None:
    """It has connections to the database, which hold up the end of a test suite."""
    runs = [
        start_run_sync(speaker("Good day"), "Hello", session_id=name)
        for name in ("a", "b")
    ]
    assert [run.result() for run in runs] == ["Good day", "Good day"]
    assert len(threads()) == 1
    runs.pop()
    assert runs[0].result() == "Good day"
    runs.clear()
    assert_gone()
    # One that fails to begin leaves none behind.
    AgentSession.objects.filter(session_id="a").update(
        run_id="r-1", state="running", run_seen_at=timezone.now()
    )
    with pytest.raises(SessionBusy):
        start_run_sync(speaker("no"), "Hello", session_id="a")
    assert_gone()


def test_a_plain_view_starts_a_run_that_outlives_it(closing: None) -> None:
    """As under WSGI: no loop runs in this process."""
    run = start_run_sync(speaker("Good day"), "Hello", session_id="s")
    events = list(run.events())
    assert text_of(events) == "Good day"
    assert run.result() == "Good day"
    assert AgentRun.objects.get(run_id=run.run_id).status == "completed"


def test_a_thread_without_a_loop_stops_a_run(closing: None) -> None:
    started: list[SyncRun] = []
    agent = speaker("never")

    class Standing(ScriptedModel):
        async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
            called.set()
            await asyncio.sleep(3600)
            yield self

    called = threading.Event()
    agent.model = Standing([])

    def work() -> None:
        started.append(start_run_sync(agent, "Hello", session_id="s"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert called.wait(60)
    with pytest.raises(SessionBusy):
        start_run_sync(speaker("no"), "Hello", session_id="s")
    started[0].stop()
    with pytest.raises(RunStopped):
        started[0].result()
    assert AgentSession.objects.get().state == "idle"


async def test_a_plain_view_under_asgi_starts_it_in_the_servers_loop() -> None:
    """So the tabs of this process hear it at once."""
    user, session_id = await conversation()
    agent = speaker("Good day")
    async with Socket(session_id, user, agent) as tab:
        await tab.sync()
        await tab.to_end()

        def view() -> SyncRun:
            return start_run_sync(agent, "Hello", session_id=session_id, user=user)

        run = await sync_to_async(view)()
        assert text_of(await tab.to_end()) == "Good day"
    assert await sync_to_async(run.result)() == "Good day"


async def test_it_outlives_synchronous_middleware_around_an_async_view() -> None:
    """The view's thread is gone when the run asks for its connection."""
    agent, model = gated("one two three")

    async def view() -> Any:
        return await start_run(agent, "Hello", session_id="s")

    run = await sync_to_async(async_to_sync(view))()
    await model.paused.wait()
    model.gate.set()
    assert await run.result() == "one two three"
    assert get_run_manager() is run._manager


async def test_the_synchronous_form_is_refused_in_async_code() -> None:
    with pytest.raises(BlockingCall, match="await start_run"):
        start_run_sync(speaker("no"), "Hello", session_id="s")
    assert await AgentRun.objects.acount() == 0
