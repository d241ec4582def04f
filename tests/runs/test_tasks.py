"""Runs that a task does: what is queued, who takes it over, and what gets lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import django
import pytest
from agents import Agent, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.db import connections
from django.db.models import F
from django_tasks_db.models import DBTaskResult

from agent_sessions import get_session
from agent_sessions.backends.leases import QUEUED
from agent_sessions.consumers import AgentConsumer
from agent_sessions.exceptions import InvalidConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits
from agent_sessions.runs.tasks import run_queued
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.streams import Http

pytestmark = pytest.mark.django_db(transaction=True)

PACKAGE = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
IMMEDIATE = f"{PACKAGE}.backends.immediate.ImmediateBackend"
HERE = "tests.runs.test_tasks"

model = ScriptedModel([])
refunded: list[int] = []


@function_tool(needs_approval=True)
def refund(order: int) -> str:
    """Refund an order."""
    refunded.append(order)
    return f"refunded {order}"


agent: Agent[Any] = Agent(name="Support", model=model, tools=[refund])


def named(user: Any, session_id: str) -> Agent[Any]:
    return agent.clone(name=f"Support of {user.pk} in {session_id}")


class Guarded(AgentConsumer):
    agent = f"{HERE}.agent"
    where = "task"
    allowed = True

    def authorize(self, user: Any, session_id: str) -> bool:
        return self.allowed


@pytest.fixture(autouse=True)
def answers() -> Iterator[None]:
    model.__init__([[assistant_message("Good day")]])  # type: ignore[misc]
    refunded.clear()
    yield
    model.__init__([])  # type: ignore[misc]


@pytest.fixture
def immediate(settings: Any) -> None:
    settings.TASKS = {"default": {"BACKEND": IMMEDIATE}}


async def queued(number: int = 0) -> Any:
    """Wait for a task of the queue."""
    async with asyncio.timeout(60):
        while await (found := DBTaskResult.objects.all()).acount() <= number:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return [task async for task in found.order_by("enqueued_at")][number]


async def work(number: int = 0) -> None:
    """Do what a worker does with a task."""
    task = await queued(number)
    args = task.args_kwargs["args"]

    def call() -> None:
        # A worker has no event loop around it.
        try:
            run_queued.call(*args)
        finally:
            connections.close_all()

    await asyncio.to_thread(call)


async def conversation() -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    return user, row.session_id


def tab(session_id: str, user: Any, **options: Any) -> Socket:
    options = {"agent": f"{HERE}.agent", "where": "task", **options}
    return Socket(session_id, user, **options)


async def test_a_run_is_done_and_heard(immediate: None) -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        events = await socket.to_end()
    assert text_of(events) == "Good day"
    assert [event["type"] for event in events].count("RUN_STARTED") == 1
    items: list[Any] = await get_session(session_id, user=user).get_items()
    assert [item["role"] for item in items] == ["user", "assistant"]
    run = await AgentRun.objects.aget()
    assert (run.status, run.agent_name, run.state) == ("completed", "Support", "")
    assert run.model


async def test_a_function_chooses_the_agent(immediate: None) -> None:
    user, session_id = await conversation()
    async with tab(session_id, user, agent=f"{HERE}.named") as socket:
        await socket.say("r-1", "Hello")
        await socket.to_end()
    run = await AgentRun.objects.aget()
    assert run.agent_name == f"Support of {user.pk} in {session_id}"


async def test_a_queue_gets_ids_and_tabs_the_question() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as one, tab(session_id, user) as two:
        await two.sync()
        await two.to_end()
        await one.say("r-1", "My secret question")
        for socket in (one, two):
            [*_, started] = await socket.until("RUN_STARTED")
            [asked] = started["input"]["messages"]
            assert asked["content"] == "My secret question"
        task = await queued()
        assert "secret" not in json.dumps(task.args_kwargs)
        await work()
        for socket in (one, two):
            assert text_of(await socket.to_end()) == "Good day"


async def test_a_task_that_comes_twice_runs_once() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
        await asyncio.gather(work(), work(), work())
        assert text_of(await socket.to_end()) == "Good day"
    assert len(model.calls) == 1
    assert len(await get_session(session_id, user=user).get_items()) == 2


async def test_a_run_is_sent_twice_and_queued_once() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
        await socket.say("r-1", "Hello")
        await socket.say("r-2", "Hello")
        refused = (await socket.frame())["chunk"]
    assert refused["code"] == "session_busy"
    await queued()
    assert await DBTaskResult.objects.acount() == 1


async def test_a_stop_before_a_worker_has_begun() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
        await socket.send({"type": "abort", "runId": "r-1"})
        [*_, end] = await socket.to_end()
    assert end["outcome"] == {"type": "cancelled"}
    await work()
    assert not model.calls
    run = await AgentRun.objects.aget()
    assert (run.status, run.state) == ("cancelled", "")
    assert (await AgentSession.objects.aget()).state == "idle"


async def test_a_lost_task_fails_after_a_while() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
        # Longer than a process may be silent: a queue may be long.
        waited = AgentSession.objects.filter(run_owner=QUEUED)
        assert await waited.aupdate(run_seen_at=F("run_seen_at") - timedelta(minutes=4))
        async with tab(session_id, user) as late:
            await late.sync()
            [started] = await late.until("RUN_STARTED")
            assert started["runId"] == "r-1"
        await waited.aupdate(run_seen_at=F("run_seen_at") - timedelta(minutes=2))
        [*_, end] = await socket.to_end()
    assert (end["type"], end["code"]) == ("RUN_ERROR", "interrupted")
    await work()
    assert not model.calls


@pytest.mark.parametrize("lost", ["account", "permission"])
async def test_the_user_is_checked_again(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, session_id = await conversation()
    async with tab(session_id, user, consumer=Guarded) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
    if lost == "account":
        await type(user).objects.filter(pk=user.pk).aupdate(is_active=False)
    else:
        monkeypatch.setattr(Guarded, "allowed", False)
    await work()
    assert not model.calls
    run = await AgentRun.objects.aget()
    assert (run.status, run.error_code) == ("failed", "forbidden")


async def test_a_deleted_session_runs_nothing() -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
    await AgentSession.objects.all().adelete()
    await work()
    assert not model.calls


async def test_a_queue_that_refuses() -> None:
    user, session_id = await conversation()
    options = {"task_options": {"queue_name": "absent"}}
    async with tab(session_id, user, **options) as socket:
        await socket.say("r-1", "Hello")
        [*_, end] = await socket.to_end()
    assert (end["type"], end["code"]) == ("RUN_ERROR", "internal")
    assert (await AgentSession.objects.aget()).run_id == ""


@pytest.mark.parametrize("changed", ["", "other"])
async def test_a_changed_row_runs_nothing(changed: str) -> None:
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await socket.until("RUN_STARTED")
        await AgentRun.objects.aupdate(state=changed)
        await work()
        [*_, end] = await socket.to_end()
    assert (end["type"], end["code"]) == ("RUN_ERROR", "internal")
    assert not model.calls


@pytest.mark.parametrize("approved", [True, False])
async def test_an_approval_is_resumed_in_a_task(approved: bool) -> None:
    model.__init__(  # type: ignore[misc]
        [
            [function_call("refund", {"order": 7}, call_id="c-1")],
            [assistant_message("Done")],
        ]
    )
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Refund 7")
        await socket.until("RUN_STARTED")
        await work()
        [*_, end] = await socket.to_end()
        assert end["outcome"]["type"] == "interrupt"
        answer = {
            "interruptId": "c-1",
            "status": "resolved",
            "payload": {"approved": approved},
        }
        await socket.answer("r-2", answer)
        await socket.until("RUN_STARTED")
        await work(1)
        assert text_of(await socket.to_end()) == "Done"
    assert refunded == [7] * approved
    runs = AgentRun.objects.order_by("pk")
    assert [run.status async for run in runs] == ["completed", "completed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"agent": agent}, "dotted path"),
        ({"agent": f"{HERE}.absent"}, "can't import"),
        ({"agent": f"{HERE}.HERE"}, "neither an Agent nor a function"),
        ({"limits": RunLimits()}, "attribute of a subclass"),
        ({"where": "cloud"}, "process, task"),
    ],
)
def test_what_no_worker_could_use_is_refused(
    options: dict[str, Any], words: str
) -> None:
    options = {"agent": f"{HERE}.agent", "where": "task", **options}
    with pytest.raises(InvalidConsumer, match=words):
        AgentConsumer.as_asgi(**options)


def test_a_class_that_no_worker_finds_is_refused() -> None:
    class Inner(AgentConsumer):
        agent = f"{HERE}.agent"

    with pytest.raises(InvalidConsumer, match="top of its module"):
        Inner.as_asgi(where="task")


async def test_a_message_is_edited_in_a_task() -> None:
    texts = ("Good day", "Good evening")
    model.__init__([[assistant_message(text)] for text in texts])  # type: ignore[misc]
    user, session_id = await conversation()
    async with tab(session_id, user) as socket:
        await socket.say("r-1", "Hello")
        await work()
        await socket.to_end()
        edit = {"agentSessions": {"edit": {"messageId": "u-r-1"}}}
        await socket.say("r-2", "Hello again", forwardedProps=edit)
        await socket.until("RUN_STARTED")
        await work(1)
        assert text_of(await socket.to_end()) == "Good evening"
    items: list[Any] = await get_session(session_id, user=user).get_items()
    assert items[0]["content"] == "Hello again"
    assert len(items) == 2


async def test_a_stream_of_http() -> None:
    user, session_id = await conversation()
    async with Http(session_id, f"{HERE}.agent", where="task") as http:
        await http.login(user)
        stream = await http.run("r-1", "Hello")
        await stream.until("RUN_STARTED")
        await work()
        assert text_of(await stream.to_end()) == "Good day"
