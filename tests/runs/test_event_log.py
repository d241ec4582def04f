"""What a run has said: all of it while there is room, and always a legal run."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions.models import AgentSession
from agent_sessions.runs import RunLimits
from agent_sessions.runs.log import EventLog
from tests.support.agui_validator import SequenceChecker
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
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


def call(name: str, *deltas: str) -> list[dict[str, Any]]:
    return [
        {"type": "TOOL_CALL_START", "toolCallId": name, "toolCallName": "f"},
        *(
            {"type": "TOOL_CALL_ARGS", "toolCallId": name, "delta": delta}
            for delta in deltas
        ),
        {"type": "TOOL_CALL_END", "toolCallId": name},
        {
            "type": "TOOL_CALL_RESULT",
            "messageId": f"{name}:result",
            "toolCallId": name,
            "content": "",
        },
    ]


def filled(events: list[dict[str, Any]], **limits: Any) -> EventLog:
    log = EventLog("r", **{"max_events": 20, "max_bytes": 100_000} | limits)
    for event in [START, *events]:
        log.append(event)
    return log


def kinds(log: EventLog) -> list[str]:
    return [frame.event["type"] for frame in log.frames()]


def test_what_has_ended_is_joined_before_anything_is_dropped() -> None:
    words = [f"{n} " for n in range(100)]
    log = filled([*message("m-1", *words), *call("c-1", *words), *message("m-2", "a")])
    assert len(log.frames()) <= 20
    said: dict[str, list[str]] = {}
    for frame in log.frames():
        if "delta" in frame.event:
            unit = frame.event.get("messageId") or frame.event["toolCallId"]
            said.setdefault(unit, []).append(frame.event["delta"])
    assert said["m-1"] == ["".join(words)]
    assert "".join(said["c-1"]) == "".join(words)
    assert said["m-2"] == ["a"]


def test_a_replay_is_exact_or_is_none() -> None:
    log = filled([*message("m-1", *"abcdefgh" * 4), *message("m-2", "x")])
    numbers = [frame.number for frame in log.frames()]
    last = numbers[-1]
    for number in range(last + 2):
        frames = log.after(number)
        if number in {0, *numbers} and frames is not None:
            assert [f.number for f in frames] == [n for n in numbers if n > number]
        else:
            assert frames is None
    assert log.after(last) == []
    assert log.after(numbers[1]) is not None
    # In the middle of what was joined.
    assert log.after(numbers[1] + 1) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(message), st.integers(0, 30)),
            st.tuples(st.just(call), st.integers(0, 30)),
        ),
        max_size=30,
    ),
    st.integers(0, 200),
    st.sampled_from([(20, 100_000), (1_000, 1_500)]),
)
def test_what_is_kept_is_always_a_legal_run(
    units: Any, cut: int, limits: tuple[int, int]
) -> None:
    events = [
        event
        for number, (make, deltas) in enumerate(units)
        for event in make(f"{make.__name__}-{number}", *["word "] * deltas)
    ]
    log = filled(events[:cut], max_events=limits[0], max_bytes=limits[1])
    checker = SequenceChecker()
    for frame in log.frames():
        checker.feed(frame.event)
    assert len(log.frames()) <= limits[0]
    assert kinds(log)[0] == "RUN_STARTED"


def test_an_endless_message_keeps_its_start_and_its_newest_words() -> None:
    log = EventLog("r", max_events=1_000, max_bytes=2_000)
    log.append(START)
    for event in message("m", *(f"{n} " * 20 for n in range(200)))[:-1]:
        log.append(event)
    assert kinds(log)[:2] == ["RUN_STARTED", "TEXT_MESSAGE_START"]
    assert sum(len(str(frame.event)) for frame in log.frames()) < 3_000


LONG = {
    "events": RunLimits(log_events=100, merge_interval=0, merge_size=1),
    "bytes": RunLimits(log_bytes=30_000, merge_size=10),
}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("bound", LONG)
async def test_a_tab_that_comes_late_sees_all_of_a_long_answer(bound: str) -> None:
    user, session_id = await conversation()
    agent, model = gated("word " * 500, pause_at=400)
    async with Socket(session_id, user, agent, limits=LONG[bound]) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        async with Socket(session_id, user, agent, limits=LONG[bound]) as other:
            await other.sync()
            events = await other.until("TEXT_MESSAGE_CONTENT")
            assert events[0]["runId"] == "r-1"
            model.gate.set()
            events += await other.to_end(within=20)
    assert text_of(events) == model.text


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
    async with Socket(session_id, user, speaker(), recheck_interval=0.2) as tab:
        await tab.sync()
        started, _ = await tab.until("MESSAGES_SNAPSHOT")
        assert started["runId"] == "r-7"
        # It is not ended, nor can what another process says be told from here on.
        assert await tab.silent(0.5)
        assert not tab.frames[-1]["id"].startswith("r-7:")
        await rows.aupdate(run_id="", run_owner="", run_seen_at=None, state="idle")
        assert await tab.closed() == 4503
