"""Runs on a backend whose items lie outside the database: the same promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, Runner
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.test import override_settings

from agent_sessions import get_session
from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.remote.base import Stretch
from agent_sessions.exceptions import LeaseLost, StoreUnavailable
from agent_sessions.items import Batch, Item, encode_batch
from agent_sessions.models import AgentRun, AgentSession, PendingClear
from agent_sessions.runs.external import SessionHooks
from tests.runs.test_runs import approve, cashier
from tests.support.approvals import lookup, refunded
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.gated import gated
from tests.support.list_backend import ListBackend
from tests.websocket.test_consumer import speaker

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]


class PartsBackend(ListBackend):
    """Writes texts as parts, as OpenAI's Conversations do, and can be down."""

    down = False

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        self.assert_up()
        items = [parted(item) for row in batch.rows if (item := decoded(row.data))]
        return await super().store_append(key, encode_batch(items))

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        self.assert_up()
        return await super().store_latest(key, limit)

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        self.assert_up()
        return await super().store_page(key, wanted)

    def assert_up(self) -> None:
        if PartsBackend.down:
            raise StoreUnavailable("The store is down.")


def decoded(text: str) -> Any:
    return json.loads(text)


def parted(item: Any) -> Any:
    if item.get("role") != "user" or not isinstance(item["content"], str):
        return item
    part = {"type": "input_text", "text": item["content"], "detail": None}
    return {**item, "id": "msg_1", "status": "completed", "content": [part]}


SETTING = {
    "default": {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"},
    "lists": {"BACKEND": ListBackend},
    "parts": {"BACKEND": PartsBackend},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cache.clear()
    refunded.clear()
    ListBackend.histories.clear()
    PartsBackend.down = False
    with override_settings(AGENT_SESSIONS=SETTING):
        yield


async def conversation(backend: str = "lists") -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend=backend)
    return user, row.session_id


def socket(session_id: str, user: Any, agent: Any, backend: str = "lists") -> Socket:
    return Socket(session_id, user, agent, backend=backend)


async def texts(session_id: str, user: Any, backend: str = "lists") -> list[Any]:
    session = get_session(session_id, user=user, backend=backend)
    items: list[Any] = list(await session.get_items())
    parts = [item.get("content") or item.get("type") for item in items]
    return [p if isinstance(p, str) else p[0]["text"] for p in parts]


async def row_of(session_id: str) -> AgentSession:
    return await AgentSession.objects.aget(session_id=session_id)


@pytest.mark.parametrize("backend", ["lists", "parts"])
async def test_a_message_is_answered_stored_and_counted(backend: str) -> None:
    user, session_id = await conversation(backend)
    agent, model = gated("Hello there")
    model.gate.set()
    async with socket(session_id, user, agent, backend) as tab:
        for number in (1, 2, 3):
            await tab.say(f"r-{number}", f"Hi {number}")
            assert text_of(await tab.to_end()) == "Hello there"
    row = await row_of(session_id)
    # The counts are not left stale by the burst.
    assert (row.state, row.item_count, row.title) == ("idle", 6, "Hi 1")
    assert (row.requests, row.input_tokens) == (3, 30)
    runs = AgentRun.objects.filter(session=row).order_by("pk")
    places = [(r.status, r.first_position, r.last_position) async for r in runs]
    assert places == [("completed", n, n + 1) for n in (1, 3, 5)]


@pytest.mark.parametrize("backend", ["lists", "parts"])
async def test_a_message_sent_again_after_a_failure_is_stored_once(
    backend: str,
) -> None:
    user, session_id = await conversation(backend)
    steps: Any = [ModelStep.raise_error(RuntimeError("secret"))] * 2
    agent = Agent(name="a", model=ScriptedModel([*steps, [assistant_message("ok")]]))
    async with socket(session_id, user, agent, backend) as tab:
        for number in (1, 2):
            await tab.say(f"r-{number}", "Hi")
            assert (await tab.to_end())[-1]["code"] == "internal"
        await tab.say("r-3", "Hi")
        assert text_of(await tab.to_end()) == "ok"
    assert await texts(session_id, user, backend) == ["Hi", "ok"]
    run = await AgentRun.objects.aget(run_id="r-3")
    assert (run.first_position, run.last_position) == (2, 2)


async def test_a_tab_comes_into_the_middle_of_a_retry() -> None:
    """The store gives the dropped message's position again: it is not shown twice."""
    user, session_id = await conversation()
    failing = Agent(
        name="a",
        model=ScriptedModel(
            [[assistant_message("before")], ModelStep.raise_error(RuntimeError())]
        ),
    )
    async with socket(session_id, user, failing) as tab:
        await tab.say("r-1", "First")
        await tab.to_end()
        await tab.say("r-2", "Hi")
        await tab.to_end()
    agent, model = gated("one two three four")
    async with socket(session_id, user, agent) as tab:
        await tab.say("r-3", "Hi")
        await model.paused.wait()
        async with socket(session_id, user, agent) as other:
            await other.sync()
            started = (await other.frame())["chunk"]
            snapshot = (await other.frame())["chunk"]
            model.gate.set()
            events = await other.to_end()
    assert started["input"]["messages"][0]["content"] == "Hi"
    contents = [message["content"] for message in snapshot["messages"]]
    assert contents == ["First", "before", "Hi"]
    assert text_of(events) == "one two three four"
    # At rest the page is the whole history.
    async with socket(session_id, user, agent) as tab:
        await tab.sync()
        (shown,) = [e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"]
    assert [m["content"] for m in shown["messages"]] == [
        *contents,
        "one two three four",
    ]


async def test_a_tool_waits_for_approval_and_then_runs_once() -> None:
    user, session_id = await conversation()
    async with socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        events = await tab.to_end()
        assert events[-1]["outcome"]["interrupts"][0]["toolCallId"] == "call_1"
        assert (await row_of(session_id)).state == "waiting"
        await tab.answer("r-2", approve())
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]
    assert await texts(session_id, user) == [
        "Refund order 42",
        "function_call",
        "function_call_output",
        "done",
    ]
    run = await AgentRun.objects.aget(run_id="r-2")
    assert (run.first_position, run.last_position) == (3, 4)


async def test_what_was_said_before_an_abort_is_kept() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        await tab.send({"type": "abort", "runId": "r-1"})
        await tab.to_end()
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.last_position) == ("cancelled", 2)
    assert await texts(session_id, user) == ["Hi", "one two"]


async def test_a_run_whose_session_is_cleared_writes_nothing_more() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await get_session(session_id, user=user, backend="lists").clear_session()
        model.gate.set()
        assert (await tab.to_end())[-1]["code"] == "interrupted"
    assert await texts(session_id, user) == []
    row = await row_of(session_id)
    assert (row.state, row.item_count) == ("idle", 0)


async def test_a_run_whose_owner_is_deleted_brings_nothing_back() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await sync_to_async(user.delete)()
        model.gate.set()
        await tab.to_end()
    assert not any(ListBackend.histories.values())
    assert not await AgentSession.objects.aexists()
    assert not await PendingClear.objects.aexists()


async def test_a_store_that_is_down_fails_the_run_and_frees_the_session() -> None:
    user, session_id = await conversation("parts")
    async with socket(session_id, user, speaker("one", "two"), "parts") as tab:
        PartsBackend.down = True
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["code"] == "internal"
        PartsBackend.down = False
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "one"
    assert await texts(session_id, user, "parts") == ["Hi", "one"]
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.first_position) == ("failed", None)


async def test_the_lease_is_looked_at_before_each_write() -> None:
    user, session_id = await conversation()
    row = await row_of(session_id)
    session = get_session(session_id, user=user, backend="lists")
    await session.fenced(row.fence).add_items([{"role": "user", "content": "Hi"}])
    await AgentSession.objects.filter(pk=row.pk).aupdate(fence=row.fence + 1)
    with pytest.raises(LeaseLost):
        await session.fenced(row.fence).add_items([{"role": "user", "content": "2"}])
    assert await texts(session_id, user) == ["Hi"]


# -- runs that the caller starts -------------------------------------------------------


async def test_a_plain_run_is_recorded_with_its_place() -> None:
    user = await sync_to_async(make_user)()
    session = get_session("s-plain", user=user, backend="lists")
    agent, model = cashier_of_two()
    for number in (1, 2):
        hooks = SessionHooks(session)
        async with hooks:
            await Runner.run(agent, f"Hi {number}", session=session, hooks=hooks)
    row = await row_of("s-plain")
    assert (row.item_count, row.requests, row.title) == (4, 2, "Hi 1")
    runs = AgentRun.objects.filter(session=row).order_by("pk")
    places = [(r.status, r.first_position, r.last_position) async for r in runs]
    assert places == [("completed", 1, 2), ("completed", 3, 4)]
    assert len(model.calls) == 2


def cashier_of_two() -> tuple[Agent[Any], ScriptedModel]:
    model = ScriptedModel([[assistant_message("one")], [assistant_message("two")]])
    return Agent(name="speaker", model=model), model


def test_a_plain_run_of_a_sync_caller_is_recorded(default_loop: None) -> None:
    user = make_user()
    session = get_session("s-sync", user=user, backend="lists")
    agent, _ = cashier_of_two()
    with SessionHooks(session) as hooks:
        Runner.run_sync(agent, "Hi", session=session, hooks=hooks)
    run = AgentRun.objects.get(session__session_id="s-sync")
    assert (run.status, run.first_position, run.last_position) == ("completed", 1, 2)
    assert AgentSession.objects.get().requests == 1


async def test_a_plain_run_that_fails_keeps_what_it_used() -> None:
    session = get_session("s-fails", backend="lists")
    steps: Any = [
        [function_call("lookup", {"order": "1"}, call_id="c-1")],
        ModelStep.raise_error(RuntimeError("secret")),
    ]
    agent = Agent(name="a", model=ScriptedModel(steps), tools=[lookup])
    hooks = SessionHooks(session)
    with pytest.raises(RuntimeError, match="secret"):
        async with hooks:
            await Runner.run(agent, "Hi", session=session, hooks=hooks)
    run = await AgentRun.objects.aget(session__session_id="s-fails")
    assert run.status == "failed"
    assert (run.first_position, run.last_position) == (1, 3)


async def test_a_plain_run_ends_well_though_its_place_is_not_known() -> None:
    session = get_session("s-down", backend="parts")
    agent, _ = cashier_of_two()
    hooks = SessionHooks(session)
    async with hooks:
        await Runner.run(agent, "Hi", session=session, hooks=hooks)
        PartsBackend.down = True
    run = await AgentRun.objects.aget(session__session_id="s-down")
    assert run.status == "completed"
