"""Signals of sessions and runs, and what the SDK's traces are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from agents import Agent, RunConfig, Runner
from agents.testing import ModelStep, ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.db import OperationalError, connection, transaction
from django.dispatch import Signal

from agent_sessions import get_session, signals
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, hold, start_run
from agent_sessions.runs.recovery import recover
from agent_sessions.runs.setup import Conversation
from tests.runs.test_runs import approve, cashier
from tests.support.chat import Socket
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)

ALL = {
    name: signal for name, signal in vars(signals).items() if isinstance(signal, Signal)
}
HELLO: Any = [{"role": "user", "content": "secret words"}]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


@pytest.fixture
def heard() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Record all signals, in the order in which they come."""
    found: list[tuple[str, dict[str, Any]]] = []
    names = {id(signal): name for name, signal in ALL.items()}

    def hear(signal: Signal, sender: type, **arguments: Any) -> None:
        found.append((names[id(signal)], arguments))

    with connected(*ALL.values(), receiver=hear):
        yield found


@contextmanager
def connected(*to: Signal, receiver: Any) -> Iterator[None]:
    for signal in to:
        signal.connect(receiver)
    try:
        yield
    finally:
        for signal in to:
            signal.disconnect(receiver)


def named(heard: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [name for name, _ in heard]


def speaker(text: str = "secret answer") -> Agent[Any]:
    return Agent(name="speaker", model=ScriptedModel([[assistant_message(text)]]))


def test_a_session_is_made_filled_and_cleared(heard: Any) -> None:
    session = get_session("s")
    session.sync.add_items(HELLO)
    session.sync.add_items(HELLO * 2)
    session.sync.clear_session()
    about = {"session_id": "s", "backend": "default", "user_id": None}
    assert heard == [
        ("session_created", about),
        ("items_added", about | {"count": 1}),
        ("items_added", about | {"count": 2}),
        ("session_cleared", about | {"count": 3}),
    ]


async def test_a_session_of_async_code(heard: Any) -> None:
    await get_session("s").add_items(HELLO)
    await get_session("s").add_items([])
    assert named(heard) == ["session_created", "items_added"]


def test_nothing_is_said_before_the_commit_or_after_a_rollback(heard: Any) -> None:
    with transaction.atomic():
        get_session("s").sync.add_items(HELLO)
        assert heard == []
    assert named(heard) == ["session_created", "items_added"]
    heard.clear()
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
        get_session("t").sync.add_items(HELLO)
        get_session("s").sync.clear_session()
        1 / 0  # noqa: B018
    assert heard == []


def test_what_is_stored_is_told_where_the_database_has_gone_away(
    heard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OperationalError("away")

    session = get_session("s")
    session.sync.add_items(HELLO)
    heard.clear()
    monkeypatch.setattr(connection, "ensure_connection", refuse)
    session.backend.directory.announce(
        signals.items_added, AgentSession, session.key, count=1
    )
    assert named(heard) == ["items_added"]


async def test_a_run_is_started_and_finished(heard: Any) -> None:
    run = await start_run(speaker(), "secret question", session_id="s")
    await run.result()
    assert named(heard) == [
        "session_created",
        "run_started",
        "items_added",
        "items_added",
        "run_finished",
    ]
    about = {"session_id": "s", "backend": "default", "user_id": None}
    assert heard[1][1] == about | {"run_id": run.run_id}
    finished = heard[-1][1]
    assert finished.pop("seconds") >= 0
    found = await AgentRun.objects.aget()
    assert finished == about | {
        "run_id": run.run_id,
        "status": "completed",
        "error_code": "",
        "requests": found.requests,
        "input_tokens": found.input_tokens,
        "output_tokens": found.output_tokens,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
    }
    assert "secret" not in str(heard)


async def test_a_held_run_says_the_same(heard: Any) -> None:
    async with hold(get_session("s")) as held:
        await Runner.run(speaker(), "Hi", session=held.session, hooks=held.hooks)
    assert named(heard)[0] == "session_created"
    assert [named(heard)[1], named(heard)[-1]] == ["run_started", "run_finished"]
    assert heard[-1][1]["status"] == "completed"


async def test_an_approval_is_requested_and_answered(heard: Any) -> None:
    user, session_id = await conversation()
    agent = cashier()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r1", "Refund it")
        await tab.to_end()
        requested = dict(heard)["approval_requested"]
        assert requested.pop("expires_at") is not None
        about = {"session_id": session_id, "backend": "default", "user_id": user.pk}
        assert requested == about | {"run_id": "r1", "count": 1}
        assert "run_finished" not in named(heard)
        await tab.answer("r2", approve("call_1"))
        await tab.to_end()
    told = dict(heard)
    assert told["approval_answered"] == about | {"run_id": "r1", "resumed_by": "r2"}
    assert (told["run_finished"]["run_id"], told["run_finished"]["status"]) == (
        "r2",
        "completed",
    )


async def test_a_run_whose_process_died_is_finished_by_who_finds_it(
    heard: Any,
) -> None:
    user, session_id = await conversation()
    found = await Conversation.find(session_id, user=user)
    row = await AgentSession.objects.aget(session_id=session_id)
    await AgentRun.objects.acreate(session=row, run_id="lost", status="running")
    await AgentSession.objects.aupdate(state="running", run_id="lost")
    await sync_to_async(recover)(found, 1)
    (said,) = [about for name, about in heard if name == "run_finished"]
    assert (said["run_id"], said["status"], said["error_code"], said["seconds"]) == (
        "lost",
        "interrupted",
        "interrupted",
        None,
    )


async def test_async_receivers_hear_too() -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def hear(**arguments: Any) -> None:
        await asyncio.sleep(0)
        loop.call_soon_threadsafe(done.set)

    with connected(signals.run_finished, receiver=hear):
        run = await start_run(speaker(), "Hi", session_id="s")
        await run.result()
        await asyncio.wait_for(done.wait(), 30)


async def test_a_receiver_that_raises_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**arguments: Any) -> None:
        raise ZeroDivisionError

    with connected(*ALL.values(), receiver=fail):
        run = await start_run(speaker("fine"), "Hi", session_id="s")
        assert await run.result() == "fine"
        await get_session("s").clear_session()
    assert {record.name for record in caplog.records} >= {"django.dispatch"}
    assert (await AgentRun.objects.aget()).status == "completed"


# -- the SDK's traces ------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Record what the SDK exports of traces, and nothing leaves this process."""
    from agents import set_trace_processors, set_tracing_disabled
    from agents.tracing import TracingProcessor

    found: list[dict[str, Any]] = []

    class Recording(TracingProcessor):
        def on_trace_start(self, trace: Any) -> None:
            found.append(trace.export())

        def on_trace_end(self, trace: Any) -> None: ...
        def on_span_start(self, span: Any) -> None: ...
        def on_span_end(self, span: Any) -> None: ...
        def shutdown(self) -> None: ...
        def force_flush(self) -> None: ...

    set_trace_processors([Recording()])
    set_tracing_disabled(False)
    yield found
    set_tracing_disabled(True)
    set_trace_processors([])


async def test_a_trace_names_session_and_run(traces: list[dict[str, Any]]) -> None:
    run = await start_run(speaker(), "Hi", session_id="s")
    await run.result()
    (trace,) = traces
    assert trace["group_id"] == "s"
    assert trace["metadata"] == {"agent_sessions_run_id": run.run_id}
    assert (await AgentRun.objects.aget()).trace_id == trace["id"]


@pytest.mark.parametrize("as_dict", [False, True])
async def test_what_the_project_says_of_traces_counts(
    traces: list[dict[str, Any]], as_dict: bool
) -> None:
    said: dict[str, Any] = {
        "group_id": "mine",
        "trace_metadata": {"agent_sessions_run_id": "mine", "plan": "gold"},
    }
    config: Any = said if as_dict else RunConfig(**said)
    run = await start_run(speaker(), "Hi", session_id="s", run_config=config)
    await run.result()
    (trace,) = traces
    assert (trace["group_id"], trace["metadata"]) == ("mine", said["trace_metadata"])


async def test_a_stopped_run_is_finished_as_cancelled(heard: Any) -> None:
    agent, model = gated("one two three")
    limits = RunLimits(run_timeout=600)
    run = await start_run(agent, "Hi", session_id="s", limits=limits)
    await model.paused.wait()
    await run.stop()
    assert heard[-1][1]["status"] == "cancelled"


# -- logs ------------------------------------------------------------------------------


async def test_signals_are_log_records(caplog: pytest.LogCaptureFixture) -> None:
    """Also without receivers, with ids and counts as their attributes."""
    with caplog.at_level("INFO", logger="agent_sessions.signals"):
        run = await start_run(speaker(), "secret question", session_id="s")
        await run.result()
    records = [r for r in caplog.records if r.name == "agent_sessions.signals"]
    names = [record.getMessage() for record in records]
    assert names[:2] == ["session_created", "run_started"]
    assert names[-1] == "run_finished"
    last = vars(records[-1])
    about = ("s", "default", run.run_id, "completed", "")
    fields = ("session_id", "backend", "run_id", "status", "error_code")
    assert tuple(last[name] for name in fields) == about
    assert last["seconds"] >= 0
    assert not any("secret" in str(vars(record)) for record in records)


async def test_what_fails_in_a_run_says_which(caplog: pytest.LogCaptureFixture) -> None:
    broken = ModelStep.raise_error(ValueError("secret"))
    agent: Agent[Any] = Agent(name="broken", model=ScriptedModel([broken]))
    run = await start_run(agent, "Hi", session_id="s")
    await run.ended()
    (record,) = [r for r in caplog.records if "error_code" in vars(r)]
    assert vars(record)["run_id"] == run.run_id
    assert vars(record)["error_type"] == "ValueError"
    assert vars(record)["error_code"] == "internal"
    assert "secret" not in record.getMessage()
