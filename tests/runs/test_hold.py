"""Plain code that holds a session: one run at a time, with its row, lease and usage."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from agents import (
    GuardrailFunctionOutput,
    MaxTurnsExceeded,
    OutputGuardrailTripwireTriggered,
    Runner,
    RunState,
    output_guardrail,
)
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.db import connections

from agent_sessions import DjangoSession, get_session
from agent_sessions.exceptions import (
    InterruptsPending,
    LeaseLost,
    SessionBusy,
    SessionDoesNotExist,
)
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, hold
from agent_sessions.testing.base import RUNS, Run
from tests.support.approvals import lookup, refund
from tests.support.usages import agent, call, say, standing, used
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db(transaction=True)

each = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
HELLO: Any = [{"role": "user", "content": "Hello"}]


async def rows() -> list[AgentRun]:
    return [row async for row in AgentRun.objects.order_by("pk")]


async def stored() -> AgentSession:
    return await AgentSession.objects.aget()


@each
async def test_a_block_is_one_run(run: Run) -> None:
    session = DjangoSession("s")
    speaker = agent(
        call("lookup", order="1"), say("ok", used(50, cached=3)), tools=[lookup]
    )
    async with hold(session) as held:
        row = await stored()
        assert (row.state, row.run_id) == ("running", held.run_id)
        await run(speaker, "Hi", session=held.session, hooks=held.hooks)
    (row_of_run,) = await rows()
    assert (row_of_run.status, row_of_run.agent_name, row_of_run.model) == (
        "completed",
        "speaker",
        "ScriptedModel",
    )
    assert (row_of_run.requests, row_of_run.input_tokens) == (2, 57)
    assert (row_of_run.first_position, row_of_run.last_position) == (1, 4)
    assert row_of_run.turn == 1
    assert row_of_run.finished_at is not None
    row = await stored()
    assert (row.state, row.run_id, row.input_tokens) == ("idle", "", 57)
    assert (row.requests, row.agent_name) == (2, "speaker")


async def test_runs_of_one_block_are_counted_together() -> None:
    session = DjangoSession("s")
    async with hold(session) as held:
        for text in ("one", "two"):
            result = await Runner.run(
                agent(say("ok")), text, session=held.session, hooks=held.hooks
            )
    (row,) = await rows()
    assert (row.requests, row.input_tokens, row.last_position) == (2, 14, 4)
    # It is the run that has a row already.
    await session.store_run_usage(result)
    assert len(await rows()) == 1


@each
async def test_the_agent_after_a_handoff_is_told_to_the_next(run: Run) -> None:
    session = DjangoSession("s")
    expert = agent(say("ok"), name="expert")
    desk = agent(call("transfer_to_expert"), name="desk", handoffs=[expert])
    async with hold(session) as held:
        assert held.agent_name == ""
        await run(desk, "Hi", session=held.session, hooks=held.hooks)
    async with hold(session) as held:
        assert held.agent_name == "expert"


async def test_a_second_one_gets_session_busy() -> None:
    session = DjangoSession("s")
    async with hold(session) as held:
        with pytest.raises(SessionBusy) as busy:
            async with hold(DjangoSession("s")):
                pytest.fail("two runs at once")
    assert busy.value.run_id == held.run_id
    async with hold(session):
        pass
    assert [row.status for row in await rows()] == ["completed", "completed"]


async def test_a_second_one_waits_for_the_first() -> None:
    order: list[str] = []
    inside = asyncio.Event()
    go_on = asyncio.Event()

    async def first() -> None:
        async with hold(DjangoSession("s")) as held:
            inside.set()
            await go_on.wait()
            await held.session.add_items(HELLO)
            order.append("first")

    async def second() -> None:
        async with hold(DjangoSession("s"), wait=60) as held:
            order.append("second")
            await held.session.add_items(HELLO)

    async with asyncio.TaskGroup() as group:
        group.create_task(first())
        await inside.wait()
        with pytest.raises(SessionBusy):
            async with hold(DjangoSession("s"), wait=0.2):
                pytest.fail("two runs at once")
        group.create_task(second())
        go_on.set()
    assert order == ["first", "second"]
    assert len(await DjangoSession("s").get_items()) == 2


# -- blocks that break off -------------------------------------------------------------


@each
async def test_a_failed_run_keeps_what_it_used(run: Run) -> None:
    calls = [call("lookup", f"c{n}", order="1") for n in range(3)]
    speaker = agent(*calls, tools=[lookup])
    with pytest.raises(MaxTurnsExceeded):
        async with hold(DjangoSession("s")) as held:
            await run(
                speaker, "Hi", session=held.session, hooks=held.hooks, max_turns=2
            )
    (row,) = await rows()
    assert (row.status, row.error_code, row.requests) == ("failed", "max_turns", 2)
    assert (await stored()).state == "idle"


async def test_an_error_of_the_block_closes_the_row() -> None:
    with pytest.raises(ZeroDivisionError):
        async with hold(DjangoSession("s")):
            1 / 0  # noqa: B018
    (row,) = await rows()
    assert (row.status, row.error_code) == ("failed", "internal")
    assert (await stored()).run_id == ""


@each
async def test_a_cancelled_block_keeps_what_it_used(run: Run) -> None:
    tool, called = standing()
    speaker = agent(call("stand_still"), tools=[tool])

    async def go() -> None:
        async with hold(DjangoSession("s")) as held:
            await run(speaker, "Hi", session=held.session, hooks=held.hooks)

    task = asyncio.create_task(go())
    await asyncio.wait_for(called.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (row,) = await rows()
    assert (row.status, row.error_code, row.input_tokens) == ("cancelled", "", 7)
    assert (await stored()).state == "idle"


async def test_one_who_is_cancelled_while_it_begins_gives_the_lease_back() -> None:
    """Whenever the cancellation comes, the session is free afterwards."""
    session = DjangoSession("s")
    await session.add_items(HELLO)

    async def go() -> None:
        async with hold(session):
            await asyncio.sleep(3600)

    for steps in range(12):
        task = asyncio.create_task(go())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await stored()).run_id == ""
    assert {row.status for row in await rows()} <= {"cancelled"}


async def test_a_stream_that_is_cancelled() -> None:
    speaker = agent(call("lookup", order="1"), say("never"), tools=[lookup])
    async with hold(DjangoSession("s")) as held:
        result = Runner.run_streamed(
            speaker, "Hi", session=held.session, hooks=held.hooks
        )
        async for event in result.stream_events():
            if event.type == "run_item_stream_event":
                result.cancel()
    (row,) = await rows()
    assert row.status == "cancelled"


async def test_an_answer_that_a_guardrail_refuses() -> None:
    @output_guardrail
    def refuse(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(None, tripwire_triggered=True)

    speaker = agent(say("no"), output_guardrails=[refuse])
    with pytest.raises(OutputGuardrailTripwireTriggered):
        async with hold(DjangoSession("s")) as held:
            await Runner.run(speaker, "Hi", session=held.session, hooks=held.hooks)
    (row,) = await rows()
    assert (row.status, row.error_code) == ("failed", "guardrail")


async def test_the_callers_own_error_after_the_answer_is_not_the_runs() -> None:
    with pytest.raises(KeyError):  # noqa: PT012
        async with hold(DjangoSession("s")) as held:
            await Runner.run(
                agent(say("ok")), "Hi", session=held.session, hooks=held.hooks
            )
            raise KeyError("later")
    (row,) = await rows()
    assert (row.status, row.error_code) == ("completed", "")


async def test_who_lost_the_lease_writes_no_more() -> None:
    session = DjangoSession("s")
    with pytest.raises(LeaseLost):  # noqa: PT012
        async with hold(session) as held:
            await held.session.add_items(HELLO)
            await session.clear_session()
            await held.session.add_items(HELLO)
    assert await session.get_items() == []
    (row,) = await rows()
    assert (row.status, row.error_code) == ("interrupted", "interrupted")


async def test_the_lease_is_kept_alive_and_its_loss_is_noticed() -> None:
    session = DjangoSession("s")
    limits = RunLimits(heartbeat=0.05)
    async with hold(session, limits=limits) as held:
        first = (await stored()).run_seen_at
        while (await stored()).run_seen_at == first:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await AgentSession.objects.aupdate(run_id="another")
        while not held.is_lost:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    (row,) = await rows()
    assert row.status == "interrupted"


# -- restored runs, owners, branches ---------------------------------------------------


async def test_a_restored_run_counts_only_what_it_adds() -> None:
    session = DjangoSession("s")
    speaker = agent(call("refund", order=42), say("ok", used(50)), tools=[refund])
    async with hold(session) as held:
        result = await Runner.run(speaker, "Hi", session=held.session, hooks=held.hooks)
    state = await RunState.from_json(speaker, result.to_state().to_json())
    state.approve(state.get_interruptions()[0])
    async with hold(session) as held:
        await Runner.run(speaker, state, session=held.session, hooks=held.hooks)
    first, second = await rows()
    assert (first.status, first.input_tokens) == ("cancelled", 7)
    assert (second.status, second.input_tokens) == ("completed", 50)
    assert (await stored()).input_tokens == 57


async def test_a_session_that_waits_for_an_approval_takes_no_run() -> None:
    session = DjangoSession("s")
    await session.add_items(HELLO)
    row = await AgentSession.objects.select_related("branch").aget()
    await sync_to_async(wait)(row)
    with pytest.raises(InterruptsPending):
        async with hold(session):
            pytest.fail("it waits")


async def test_someone_elses_session_is_not_held() -> None:
    users = get_user_model()._default_manager
    ours = await users.acreate(username="ours")
    theirs = await users.acreate(username="theirs")
    await DjangoSession("s", user=ours).add_items(HELLO)
    with pytest.raises(SessionDoesNotExist):
        async with hold(DjangoSession("s", user=theirs)):
            pytest.fail("it is not theirs")
    assert await rows() == []


async def test_a_branch_of_its_own() -> None:
    session = DjangoSession("s")
    await session.add_items(HELLO)
    await session.create_branch_from_turn(1, "other")
    await session.switch_to_branch("main")
    async with hold(DjangoSession("s", branch="other")) as held:
        await Runner.run(agent(say("ok")), "Hi", session=held.session, hooks=held.hooks)
    (row,) = [row async for row in AgentRun.objects.select_related("branch")]
    assert row.branch is not None
    assert (row.branch.name, row.last_position) == ("other", 2)
    assert len(await session.get_items()) == 1


async def test_what_is_no_session_of_ours_is_refused() -> None:
    from agents import SQLiteSession

    other: Any = SQLiteSession("s")
    with pytest.raises(TypeError, match=r"run\.session"):
        hold(other)


async def test_a_store_outside_the_database(settings: Any) -> None:
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": "tests.support.list_backend.ListBackend"}
    }
    async with hold(get_session("outside")) as held:
        await Runner.run(agent(say("ok")), "Hi", session=held.session, hooks=held.hooks)
    (row,) = await rows()
    assert (row.status, row.first_position, row.last_position) == ("completed", 1, 2)


# -- synchronous code ------------------------------------------------------------------


def test_a_plain_block(default_loop: None) -> None:
    with hold(DjangoSession("s")) as held:
        result = Runner.run_sync(
            agent(say("ok")), "Hi", session=held.session, hooks=held.hooks
        )
    assert result.final_output == "ok"
    row = AgentRun.objects.get()
    assert (row.status, row.input_tokens, row.last_position) == ("completed", 7, 2)
    assert AgentSession.objects.get().state == "idle"


def test_a_plain_block_beats() -> None:
    limits = RunLimits(heartbeat=0.05)
    with hold(DjangoSession("s"), limits=limits) as held:
        first = AgentSession.objects.get().run_seen_at
        while AgentSession.objects.get().run_seen_at == first:
            threading.Event().wait(0.02)
        AgentSession.objects.update(run_id="another")
        while not held.is_lost:
            threading.Event().wait(0.02)
    assert AgentRun.objects.get().status == "interrupted"


def test_two_clicks_on_a_plain_view_do_not_interleave() -> None:
    """Each asks and answers; with two threads the pairs stay together."""

    def click(name: str) -> str:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            with hold(DjangoSession("s"), wait=60) as held:
                speaker = agent(
                    call("lookup", order="1"), say(f"to {name}"), tools=[lookup]
                )
                Runner.run_sync(speaker, name, session=held.session, hooks=held.hooks)
            return name
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            connections.close_all()

    names = [f"n{n}" for n in range(6)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(click, names)) == names
    items: list[Any] = DjangoSession("s").sync.get_items()
    turns = [items[n : n + 4] for n in range(0, len(items), 4)]
    assert len(turns) == len(names)
    for asked, called, output, answer in turns:
        assert asked["role"] == "user"
        assert (called["type"], output["type"]) == (
            "function_call",
            "function_call_output",
        )
        assert answer["content"][0]["text"] == f"to {asked['content']}"


# -- other processes -------------------------------------------------------------------

_CLICK = """
import asyncio, sys, django
django.setup()
from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from agent_sessions import DjangoSession
from agent_sessions.exceptions import SessionBusy
from agent_sessions.runs import hold

def say(word):
    print(word, flush=True)

async def click(wait):
    try:
        async with hold(DjangoSession("s"), wait=wait) as held:
            await held.session.add_items([{"role": "user", "content": "one"}])
            say("holds")
            sys.stdin.readline()
            await held.session.add_items([{"role": "user", "content": "two"}])
        say("done")
    except SessionBusy:
        say("busy")

asyncio.run(click(float(sys.argv[1])))
"""


def _other(environment: dict[str, str], wait: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CLICK, str(wait)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _hears(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_clicks_in_two_processes(database_environment: dict[str, str]) -> None:
    with (
        _other(database_environment, 0) as first,
        _other(database_environment, 60) as third,
    ):
        holder = first if (said := _hears(first)) == "holds" else third
        if said == "busy":
            assert _hears(third) == "holds"
        with _other(database_environment, 0) as second:
            assert _hears(second) == "busy"
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert _hears(holder) == "done"
        if holder is first:
            assert _hears(third) == "holds"
            assert third.stdin is not None
            third.stdin.write("\n")
            third.stdin.flush()
            assert _hears(third) == "done"
    items: list[Any] = DjangoSession("s").sync.get_items()
    contents = [item["content"] for item in items]
    assert contents in (["one", "two"] * 2, ["one", "two"])


def test_a_holder_that_is_killed_is_followed(
    database_environment: dict[str, str],
) -> None:
    with _other(database_environment, 0) as first:
        assert _hears(first) == "holds"
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    limits = RunLimits(heartbeat=0.1, stale_after=1)
    with hold(DjangoSession("s"), wait=60, limits=limits):
        pass
    statuses = list(AgentRun.objects.order_by("pk").values_list("status", flat=True))
    assert statuses == ["interrupted", "completed"]
