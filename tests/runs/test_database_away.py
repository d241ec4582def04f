"""What clients are told if hooks fail or the database is away, and when a lease ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    function_tool,
    output_guardrail,
)
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.db import OperationalError
from django.db.models import Sum

from agent_sessions import get_session
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import Conversation, RunLimits, get_run_manager, telling
from tests.runs.test_runs import approve
from tests.settings import DATABASE_KIND
from tests.support.approvals import refund
from tests.support.away import Outage, database_away
from tests.support.chat import Closed, Socket, text_of
from tests.support.gated import gated
from tests.support.usages import agent, call, say
from tests.websocket.test_consumer import conversation, items_of

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
            await tab.say("r-2", "Hi")
            assert await tab.closed() == 4503
        assert (await settled(session_id)).state == "idle"
    async with Socket(session_id, user, speaker) as tab:
        await tab.say("r-3", "Hi")
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


# -- the end of a run in an outage, and each moment before it ----------------------------


def refusing(outage: contextlib.ExitStack) -> Agent[Any]:
    """Make an agent whose answer is refused as the database goes away."""

    @output_guardrail
    async def refuse(*args: Any) -> GuardrailFunctionOutput:
        outage.enter_context(database_away())
        return GuardrailFunctionOutput(None, tripwire_triggered=True)

    return agent(say("a secret"), output_guardrails=[refuse])


@pytest.mark.parametrize(
    ("action", "left"), [("keep", ["Hi"]), ("redact", ["[blocked]"]), ("remove", [])]
)
async def test_what_was_refused_is_taken_back_once_the_database_is_back(
    action: Any, left: list[str]
) -> None:
    user, session_id = await conversation()
    with contextlib.ExitStack() as outage:
        speaker = refusing(outage)
        options: Any = {"recheck_after": 60, "blocked_messages": action}
        async with Socket(session_id, user, speaker, **options) as tab:
            await tab.say("r-1", "Hi")
            events = await tab.to_end()
            assert text_of(events) == "a secret"
            assert (events[-1]["type"], events[-1]["code"]) == (
                "RUN_ERROR",
                "guardrail",
            )
            offset = tab.frames[-1]["id"]
            outage.close()
            (told,) = [
                e for e in await tab.to_end(10) if e["type"] == "MESSAGES_SNAPSHOT"
            ]
        assert [m["content"] for m in told["messages"]] == left
        # So is it for a page that was not there then.
        async with Socket(session_id, user, speaker, **options) as tab:
            await tab.sync(offset)
            (told,) = [
                e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"
            ]
        assert [m["content"] for m in told["messages"]] == left
    assert [text for *_, text in await items_of(session_id)] == left
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.error_code) == ("failed", "guardrail")


async def test_words_of_a_stopped_answer_are_kept_once_the_database_is_back() -> None:
    user, session_id = await conversation()
    speaker, model = gated("one two three")
    async with Socket(session_id, user, speaker, recheck_after=60) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        run = get_run_manager().active(await Conversation.find(session_id, user=user))
        assert run is not None
        with database_away():
            run.abort()
            assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        events = await tab.to_end(10)
    (told,) = [e for e in events if e["type"] == "MESSAGES_SNAPSHOT"]
    assert told["messages"][-1]["metadata"] == {"stopped": True}
    texts = [text for *_, text in await items_of(session_id)]
    assert [texts[0], texts[1].strip()] == ["Hi", "one two"]


async def settled(session_id: str) -> AgentSession:
    """Wait until a session has no run any more, and none has anything to write."""
    tasks = {t for t in asyncio.all_tasks() if t.get_name().startswith("agent run ")}
    if tasks:
        _, going_on = await asyncio.wait(tasks, timeout=10)
        assert not going_on
    async with asyncio.timeout(10):
        while True:
            row = await AgentSession.objects.aget(session_id=session_id)
            if not row.run_id:
                return row
            await asyncio.sleep(0.02)


async def asks_in_an_outage(at: int, commits: bool) -> bool:
    """Run a tool that asks first, in an outage from statement `at` on.

    Return whether the outage has come in time.
    """
    cache.clear()
    user, session_id = await conversation()
    outage = Outage(at, commits=commits)
    cashier = agent(call("refund", order="1"), say("done"), tools=[refund])
    # A lease whose commit was not answered doesn't wait for its age.
    options: Any = {"limits": RunLimits(heartbeat=0.3, stale_after=60)}
    with outage.watched():
        stays = options | {"recheck_after": 60, "recheck_interval": 60}
        async with Socket(session_id, user, cashier, **stays) as tab:
            await tab.say("r-1", "Refund order 1")
            if await ends(tab, outage):
                await tab.answer("r-2", approve())
                await ends(tab, outage)
        outage.end()
        looks = options | {"recheck_interval": 0.2}
        async with Socket(session_id, user, cashier, **looks) as tab:
            await tab.sync()
            row = await settled(session_id)
    assert row.state != "running"
    totals = AgentRun.objects.filter(session=row).aggregate
    used = await sync_to_async(totals)(tokens=Sum("input_tokens"))
    assert row.input_tokens == (used["tokens"] or 0)
    await assert_it_goes_on(row, user, cashier)
    return outage.began


async def ends(tab: Socket, outage: Outage) -> bool:
    """Wait until a tab is told the end; return whether all is well."""
    try:
        end = (await tab.to_end(10))[-1]
    except Closed as closed:
        code: Any = closed.code
    else:
        code = end.get("code")
    assert code is None or (code in {4503, "internal"} and outage.began)
    return code is None


async def assert_it_goes_on(row: AgentSession, user: Any, cashier: Agent[Any]) -> None:
    """Assert that a person comes to an answer, and nothing is there twice."""
    again = call("refund", "call_2", order="1")
    runs = AgentRun.objects.filter(session=row).order_by("-pk")
    status = await runs.values_list("status", flat=True).afirst()
    model = cashier.model = ScriptedModel([say("ok")])
    async with Socket(row.session_id, user, cashier) as tab:
        if status != "waiting" and status != "completed":
            model = cashier.model = ScriptedModel([again, say("ok")])
            await tab.say("r-9", "Refund order 1")
            await tab.to_end()
        else:
            await tab.sync()
            await tab.to_end()
        if tab.asked:
            await tab.answer("r-10", approve(*tab.asked))
            assert (await tab.to_end())[-1]["outcome"] == {"type": "success"}
    items = await stored_items(row.session_id, user)
    assert [i["content"] for i in items if i.get("role") == "user"] == [
        "Refund order 1"
    ]
    assert items[-1]["role"] == "assistant"
    for sent in [items, *(each.input for each in model.calls)]:
        made = [i["call_id"] for i in sent if i.get("type") == "function_call"]
        got = [i["call_id"] for i in sent if i.get("type") == "function_call_output"]
        assert len(set(made)) == len(made)
        assert len(set(got)) == len(got)
        assert sent is items or made == got


async def stored_items(session_id: str, user: Any) -> list[Any]:
    return list(await get_session(session_id, user=user).get_items())


@pytest.mark.parametrize(("commits", "step", "least"), [(False, 5, 20), (True, 1, 3)])
async def test_each_moment_of_a_run_may_lose_the_database(
    commits: bool, step: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "FIRST_PAUSE", 0.02)
    at = 1
    while await asks_in_an_outage(at, commits):
        at += step
    # It came to the end.
    assert at > least
