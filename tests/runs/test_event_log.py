"""What a run has said: all of it while there is room, and always a legal run."""

from __future__ import annotations

from typing import Any

import pytest
from agents.testing import ModelStep
from django.core.cache import cache
from django.utils import timezone

from agent_sessions import get_session
from agent_sessions.agui import OpenRun, StreamOptions
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import Conversation, get_run_manager
from agent_sessions.runs.log import Frame, Subscription
from tests.runs.test_runs import cashier
from tests.support import usages
from tests.support.approvals import lookup
from tests.support.chat import Socket, text_of
from tests.support.usages import say
from tests.websocket.test_consumer import conversation, speaker

START = {"type": "RUN_STARTED", "threadId": "t", "runId": "r"}


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def message(name: str, *deltas: str) -> list[dict[str, Any]]:
    return [
        {"type": "TEXT_MESSAGE_START", "messageId": name, "role": "assistant"},
        *(
            {"type": "TEXT_MESSAGE_CONTENT", "messageId": name, "delta": delta}
            for delta in deltas
        ),
        {"type": "TEXT_MESSAGE_END", "messageId": name},
    ]


@pytest.mark.django_db(transaction=True)
async def test_a_run_of_another_process_is_shown_as_running() -> None:
    user, session_id = await conversation()
    rows = AgentSession.objects.filter(session_id=session_id)
    await rows.aupdate(
        run_id="r-7",
        run_owner="elsewhere:1:x",
        run_seen_at=timezone.now(),
        state="running",
    )
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        started, _ = await tab.until("MESSAGES_SNAPSHOT")
        assert started["runId"] == "r-7"
        # It is not ended, nor can what another process says be told from here on.
        assert await tab.silent(0.5)
        assert not tab.frames[-1]["id"].startswith("r-7:")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("status", "code", "end"),
    [
        ("completed", "", {"type": "RUN_FINISHED", "outcome": {"type": "success"}}),
        ("cancelled", "", {"type": "RUN_FINISHED", "outcome": {"type": "cancelled"}}),
        ("failed", "guardrail", {"type": "RUN_ERROR", "code": "guardrail"}),
        ("interrupted", "interrupted", {"type": "RUN_ERROR", "code": "interrupted"}),
        (None, "", {"type": "RUN_ERROR", "code": "interrupted"}),
    ],
)
async def test_the_end_of_another_processs_run_is_told_in_place(
    status: str | None, code: str, end: dict[str, Any]
) -> None:
    user, session_id = await conversation()
    rows = AgentSession.objects.filter(session_id=session_id)
    lease = {"run_owner": "elsewhere:1:x", "run_seen_at": timezone.now()}
    await rows.aupdate(run_id="r-7", state="running", **lease)
    async with Socket(session_id, user, speaker("Hello")) as tab:
        await tab.sync()
        await tab.until("MESSAGES_SNAPSHOT")
        session = get_session(session_id, user=user)
        await session.add_items([{"role": "assistant", "content": "last words"}])
        if status is not None:
            run = {"run_id": "r-7", "status": status, "error_code": code}
            await AgentRun.objects.acreate(session=await rows.aget(), **run)
        await rows.aupdate(run_id="", run_owner="", run_seen_at=None, state="idle")
        snapshot, last = await tab.to_end()
        assert [m["content"] for m in snapshot["messages"]] == ["last words"]
        assert end.items() <= last.items()
        assert "r-7" in {last.get("runId"), last.get("metadata", {}).get("runId")}
        # The same socket goes on.
        await tab.say("r-8", "Hi")
        assert text_of(await tab.to_end()) == "Hello"


@pytest.mark.django_db(transaction=True)
async def test_the_run_after_another_processs_run_is_told_too() -> None:
    user, session_id = await conversation()
    rows = AgentSession.objects.filter(session_id=session_id)
    lease = {"run_owner": "elsewhere:1:x", "run_seen_at": timezone.now()}
    await rows.aupdate(run_id="r-7", state="running", **lease)
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        await tab.until("MESSAGES_SNAPSHOT")
        await AgentRun.objects.acreate(
            session=await rows.aget(), run_id="r-7", status="completed"
        )
        await rows.aupdate(run_id="r-8")
        _, last = await tab.to_end()
        assert (last["type"], last["runId"]) == ("RUN_FINISHED", "r-7")
        started, _ = await tab.until("MESSAGES_SNAPSHOT")
        assert started["runId"] == "r-8"


def test_what_is_open_is_closed_from_the_inside_out() -> None:
    told = OpenRun()
    step = {"type": "STEP_STARTED", "stepName": "a"}
    for event in [START, step, *message("m-1", "a"), *message("m-2", "b")[:2]]:
        told.follow(event)
    assert told.ends() == [
        {"type": "TEXT_MESSAGE_END", "messageId": "m-2"},
        {"type": "STEP_FINISHED", "stepName": "a"},
    ]


# -- a listener that goes on from the rows -----------------------------------------------


async def told(listener: Subscription, found: Conversation) -> list[dict[str, Any]]:
    """Bring a listener that lags up to date, and return the events."""
    await get_run_manager().sync(
        found,
        listener,
        offset=None,
        options=StreamOptions(),
        stale_after=60,
        begins=False,
    )
    events = []
    while not listener.is_idle:
        frame = await listener.get()
        assert frame is not None
        events.append(frame.event)
    return events


@pytest.mark.django_db(transaction=True)
async def test_what_is_told_of_the_rest_goes_on_after_a_gap() -> None:
    """A page is told no failure of the run that only tells it what is there."""
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    listener = Subscription()
    listener.give_up()
    started, *_ = await told(listener, found)
    listener.open.follow(started)
    listener.give_up()
    snapshot, end = await told(listener, found)
    assert snapshot["type"] == "MESSAGES_SNAPSHOT"
    assert (end["runId"], end["outcome"]) == (started["runId"], {"type": "success"})


@pytest.mark.django_db(transaction=True)
async def test_what_comes_after_an_end_that_the_rows_have_told_is_left_out() -> None:
    """The rows say that a run is over before its last frames arrive."""
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    listener = Subscription()
    for number, event in enumerate([START, *message("m-1", "a")[:2]], 1):
        listener.put(Frame("r", number, event))
        assert await listener.get() is not None
    listener.give_up()
    kinds = [event["type"] for event in await told(listener, found)]
    assert kinds == ["TEXT_MESSAGE_END", "MESSAGES_SNAPSHOT", "RUN_ERROR"]
    listener.put(Frame("r", 4, message("m-1")[-1]))
    assert await listener.get() is None
    # What it is told instead is a legal run.
    events = await told(listener, found)
    assert [event["type"] for event in events[::2]] == ["RUN_STARTED", "RUN_FINISHED"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_end_that_the_rows_tell_says_what_the_run_used(fails: bool) -> None:
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    last = ModelStep.raise_error(RuntimeError("away")) if fails else say("done")
    speaking = usages.agent(usages.call("lookup", order="1"), last, tools=[lookup])
    async with Socket(session_id, user, speaking) as tab:
        await tab.say("r-1", "Hi")
        live = (await tab.to_end())[-1]
    listener = Subscription()
    listener.open.follow({**START, "runId": "r-1"})
    listener.give_up()
    end = (await told(listener, found))[-1]
    assert live["usage"][0]["inputTokens"] == (7 if fails else 14)
    assert end == live
    # What only tells of the rest has used nothing.
    listener = Subscription()
    listener.give_up()
    assert "usage" not in (await told(listener, found))[-1]


@pytest.mark.django_db(transaction=True)
async def test_an_approval_of_the_next_run_is_told_with_the_end_of_the_last() -> None:
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    row = {"session_id": found.pk, "status": "completed"}
    await AgentRun.objects.acreate(run_id="r-1", **row)
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-2", "Refund order 42")
        asked = (await tab.to_end())[-1]["outcome"]
    listener = Subscription()
    listener.open.follow({**START, "runId": "r-1"})
    listener.give_up()
    end = (await told(listener, found))[-1]
    assert end["runId"] == "r-1"
    assert end["outcome"] == asked
