"""The websocket: frames in, AG-UI out, refusals and close codes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from agents import Agent
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY
from django.contrib.auth.models import AnonymousUser
from django.contrib.sessions.backends.db import SessionStore
from django.core.cache import cache

from agent_sessions.agui import StreamOptions
from agent_sessions.consumers import AgentConsumer
from agent_sessions.exceptions import InvalidBackend, InvalidConsumer
from agent_sessions.models import AgentRun, AgentSession, RunEvents, SessionItem
from agent_sessions.runs import RunLimits, Subscription, get_run_manager
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.gated import gated
from tests.support.ratelimits import early_in_the_minute

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def speaker(*texts: str) -> Agent[Any]:
    return Agent(
        name="speaker",
        model=ScriptedModel([[assistant_message(text)] for text in texts]),
    )


async def conversation() -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    return user, row.session_id


async def items_of(session_id: str) -> list[Any]:
    items = SessionItem.objects.filter(branch__session__session_id=session_id)
    return [
        (item.type, item.role, item.text) async for item in items.order_by("position")
    ]


# -- runs ------------------------------------------------------------------------------


async def test_a_message_is_answered_and_stored() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("Hello there")) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[0]["type"] == "RUN_STARTED"
    assert events[0]["input"]["messages"][0]["content"] == "Hi"
    assert text_of(events) == "Hello there"
    assert events[-1]["outcome"] == {"type": "success"}
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_id, row.item_count, row.title) == ("idle", "", 2, "Hi")
    run = await AgentRun.objects.aget(session=row)
    assert (run.status, run.first_position, run.last_position) == ("completed", 1, 2)
    assert run.agent_name == row.agent_name == "speaker"


async def test_the_next_turn_sees_the_one_before() -> None:
    user, session_id = await conversation()
    agent = speaker("one", "two")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "first")
        await tab.to_end()
        await tab.say("r-2", "second")
        await tab.to_end()
    assert isinstance(agent.model, ScriptedModel)
    seen = agent.model.calls[1].input
    assert [item.get("content") for item in seen if item["role"] == "user"] == [
        "first",
        "second",
    ]


async def test_ids_count_from_one_without_a_hole() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("Hello there")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    ids = [frame["id"] for frame in tab.frames]
    assert ids == [f"r-1:{number}" for number in range(1, len(ids) + 1)]


async def test_deltas_are_joined() -> None:
    """One frame a word would overrun a channel layer's capacity of 100."""
    user, session_id = await conversation()
    agent, model = gated("word " * 500, pause_at=-1)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    deltas = [event for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert text_of(events) == model.text
    assert len(deltas) < 25


async def test_usage_is_recorded_on_run_and_session() -> None:
    user, session_id = await conversation()
    agent, model = gated("a b c")
    model.gate.set()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
        await tab.say("r-2", "Hi again")
        await tab.to_end()
    assert events[-1]["usage"][0]["inputTokens"] == 10
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.requests, row.input_tokens, row.output_tokens) == (2, 20, 10)
    assert (row.cached_tokens, row.reasoning_tokens) == (8, 4)
    run = await AgentRun.objects.aget(session=row, run_id="r-1")
    assert (run.requests, run.input_tokens, run.cached_tokens) == (1, 10, 4)


async def test_a_repeated_run_id_is_answered_from_the_log_and_not_run_again() -> None:
    """hermes-agent PR 84876: a double submit ran the agent twice."""
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("once")) as tab:
        await tab.say("r-1", "Hi")
        first = await tab.to_end()
        await tab.say("r-1", "Hi")
        assert await tab.to_end() == first
    assert len(await items_of(session_id)) == 2
    assert await AgentRun.objects.filter(session__session_id=session_id).acount() == 1


async def test_a_handoff_is_shown_and_the_next_turn_goes_on_with_its_agent() -> None:
    user, session_id = await conversation()
    second = Agent(
        name="billing",
        model=ScriptedModel([[assistant_message("b1")], [assistant_message("b2")]]),
    )
    first = Agent(
        name="front",
        model=ScriptedModel([[function_call("transfer_to_billing", {}, call_id="h")]]),
        handoffs=[second],
    )
    async with Socket(session_id, user, first) as tab:
        await tab.say("r-1", "an invoice")
        events = await tab.to_end()
        await tab.say("r-2", "more")
        assert text_of(await tab.to_end()) == "b2"
    (handoff,) = (event for event in events if event["type"] == "CUSTOM")
    assert handoff["name"] == "agent_sessions:handoff"
    assert handoff["value"] == {"from": "front", "to": "billing"}


async def test_another_process_may_not_run_at_the_same_time() -> None:
    """The SDK's stores interleave two runs: user, user, call1, out1, call2, …"""
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        async with Socket(session_id, user, speaker("no")) as other:
            await other.say("r-2", "Me too")
            refusal = (await other.frame())["chunk"]
            assert await other.silent()
        model.gate.set()
        assert text_of(await tab.to_end()) == "one two three"
    assert refusal["code"] == "session_busy"
    assert refusal["metadata"] == {"runId": "r-2"}
    assert [text for _, _, text in await items_of(session_id)] == [
        "Hi",
        "one two three",
    ]


async def test_a_run_begins_only_after_the_last_words_of_the_one_before() -> None:
    """The row is free a moment before the stream has ended, and a tab may be quick."""
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with (
        Socket(session_id, user, agent) as one,
        Socket(session_id, user, agent) as two,
    ):
        await one.say("r-1", "Hi")
        await model.paused.wait()
        await two.sync()
        await two.until("TEXT_MESSAGE_CONTENT")
        rows = AgentSession.objects.filter(session_id=session_id)
        await rows.aupdate(run_id="", state="idle")
        await two.say("r-2", "Hi again")
        assert await two.silent()
        model.gate.set()
        # Held to the official client's order: no run begins inside another.
        assert (await two.to_end())[-1]["metadata"] == {"runId": "r-1"}
        assert text_of(await two.to_end()) == "one two three"


# -- ends ------------------------------------------------------------------------------


async def test_abort_stops_at_once_and_keeps_what_was_said() -> None:
    """agent-framework 8157: a partial answer was lost on cancel."""
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        await tab.send({"type": "abort", "runId": "r-1"})
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "cancelled"}
    assert [text for *_, text in await items_of(session_id)] == ["Hi", "one two"]
    run = await AgentRun.objects.aget(run_id="r-1")
    assert run.status == "cancelled"
    row = await AgentSession.objects.aget(session_id=session_id)
    assert row.state == "idle"


async def test_abort_after_the_turn_lets_it_end() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1", "mode": "after_turn"})
        await tab.send({"type": "abort", "runId": "unknown"})
        model.gate.set()
        events = await tab.to_end()
    assert text_of(events) == "one two three four"
    assert events[-1]["outcome"] == {"type": "success"}


async def test_a_model_error_is_told_in_our_words_and_a_retry_doubles_nothing() -> None:
    """Each ending but the normal one leaves the user's message; a retry doubled it."""
    user, session_id = await conversation()
    model = ScriptedModel(
        [ModelStep.raise_error(RuntimeError("secret")), [assistant_message("ok")]]
    )
    async with Socket(session_id, user, Agent(name="a", model=model)) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
        assert events[-1]["code"] == "internal"
        assert "secret" not in json.dumps(tab.frames)
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "ok"
    assert [text for *_, text in await items_of(session_id)] == ["Hi", "ok"]
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.error_code) == ("failed", "internal")


async def test_no_contents_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    user, session_id = await conversation()
    model = ScriptedModel([ModelStep.raise_error(RuntimeError("secret words"))])
    with caplog.at_level("DEBUG", logger="agent_sessions"):
        async with Socket(session_id, user, Agent(name="a", model=model)) as tab:
            await tab.say("r-1", "private words")
            await tab.to_end()
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("agent_s")]
    signals = ["run_started", "run_finished"]
    assert sorted(ours) == ["Run 'r-1' failed: internal (RuntimeError)", *signals[::-1]]
    assert "words" not in str([vars(record) for record in caplog.records])


async def test_too_many_turns_keep_what_was_done() -> None:
    user, session_id = await conversation()
    from tests.support.approvals import lookup

    model = ScriptedModel(
        [[function_call("lookup", {"order": "1"}, call_id=f"c{n}")] for n in range(3)]
    )
    agent = Agent(name="a", model=model, tools=[lookup])
    limits = RunLimits(max_turns=2)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "max_turns"
    assert len(await items_of(session_id)) == 5


async def test_a_run_that_takes_too_long_ends() -> None:
    user, session_id = await conversation()
    agent, _ = gated("one two three")
    limits = RunLimits(run_timeout=0.2)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "timeout"
    assert (await AgentRun.objects.aget(run_id="r-1")).error_code == "timeout"


# -- several tabs, reloads -------------------------------------------------------------


async def test_all_tabs_of_the_user_see_the_run() -> None:
    user, session_id = await conversation()
    agent = speaker("Hello")
    async with (
        Socket(session_id, user, agent) as one,
        Socket(session_id, user, agent) as two,
    ):
        await two.sync()
        await two.to_end()
        await one.say("r-1", "Hi")
        events = await one.to_end()
        assert await two.to_end() == events


async def test_a_socket_hears_nothing_before_its_first_frame() -> None:
    user, session_id = await conversation()
    agent = speaker("Hello")
    async with (
        Socket(session_id, user, agent) as one,
        Socket(session_id, user, agent) as two,
    ):
        await one.say("r-1", "Hi")
        await one.to_end()
        assert await two.silent()


async def test_the_run_outlives_its_socket_and_a_reload_misses_nothing() -> None:
    """chatkit 9 and 23: a refresh loses the run."""
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        seen = await tab.until("TEXT_MESSAGE_CONTENT")
        offset = tab.frames[-1]["id"]
    async with Socket(session_id, user, agent) as again:
        again.checker = tab.checker
        await again.sync(offset)
        assert await again.silent()
        model.gate.set()
        rest = await again.to_end()
    assert text_of(seen) + text_of(rest) == "one two three four"
    numbers = [f["id"] for f in [*tab.frames, *again.frames]]
    assert numbers == [f"r-1:{n}" for n in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("offset", [None, "r-0:3", "r-1:999", "nonsense", "r-1:x"])
async def test_a_tab_that_knows_nothing_is_brought_into_the_middle(
    offset: str | None,
) -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, speaker("before")) as tab:
        await tab.say("r-0", "First")
        await tab.to_end()
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        async with Socket(session_id, user, agent) as other:
            await other.sync(offset)
            started = (await other.frame())["chunk"]
            snapshot = (await other.frame())["chunk"]
            model.gate.set()
            events = await other.to_end()
    assert started["input"]["messages"][0]["content"] == "Hi"
    assert [message["content"] for message in snapshot["messages"]] == [
        "First",
        "before",
        "Hi",
    ]
    assert text_of(events) == "one two three four"


async def test_a_sync_at_rest_is_a_legal_run_with_the_history() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("Hello")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.sync()
        events = await tab.to_end()
    assert [event["type"] for event in events] == [
        "RUN_STARTED",
        "MESSAGES_SNAPSHOT",
        "RUN_FINISHED",
    ]
    assert events[0]["runId"].startswith("sync:")
    assert [m["content"] for m in events[1]["messages"]] == ["Hi", "Hello"]
    assert events[1]["metadata"] == {"branch": "main"}


async def test_a_failure_is_told_again_after_a_reload() -> None:
    user, session_id = await conversation()
    model = ScriptedModel([ModelStep.raise_error(RuntimeError())])
    async with Socket(session_id, user, Agent(name="a", model=model)) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.sync()
        events = await tab.to_end()
    assert events[-1]["type"] == "RUN_ERROR"
    assert events[-1]["metadata"] == {"runId": "r-1"}


async def test_a_long_history_comes_in_parts() -> None:
    user, session_id = await conversation()
    row = await AgentSession.objects.aget(session_id=session_id)
    from agent_sessions import DjangoSession

    session = DjangoSession(session_id, user=user)
    await session.add_items(
        [{"role": "user", "content": f"m{number}"} for number in range(150)]
    )
    assert row.item_count == 0
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        _, snapshot, _ = await tab.to_end()
    assert len(snapshot["messages"]) == 100
    assert snapshot["messages"][0]["content"] == "m50"
    assert snapshot["metadata"] == {"before": "51", "branch": "main"}


async def test_a_slow_listener_is_told_to_start_afresh() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        manager = get_run_manager()
        run = next(iter(manager._runs.values()))
        slow = Subscription(limit=1)
        manager.subscribe(run.conversation, slow)
        model.gate.set()
        await tab.to_end()
        assert slow.lagging
        assert await slow.get() is None
        await manager.sync(
            run.conversation, slow, offset=None, options=StreamOptions(), stale_after=60
        )
        kinds = []
        for _ in range(3):
            frame = await slow.get()
            assert frame is not None
            kinds.append(frame.event["type"])
    assert kinds == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]


async def test_a_run_that_nobody_listens_to_ends_after_its_turn() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    limits = RunLimits(detach_timeout=0.05)
    async with Socket(session_id, user, agent, limits=limits) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        (task,) = get_run_manager()._tasks
        run = next(iter(get_run_manager()._runs.values()))
    await asyncio.sleep(0.1)
    assert run._abort_mode == "after_turn"
    model.gate.set()
    await task
    assert (await AgentRun.objects.aget(run_id="r-1")).status == "completed"


async def test_a_run_whose_log_has_lost_words_is_shown_as_running() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    events = RunEvents.objects.filter(run__run_id="r-1")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        (run,) = get_run_manager()._runs.values()
        await get_run_manager().writer.flush(run.rows)
        assert (await events.adelete())[0]
        async with Socket(session_id, user, agent) as other:
            await other.sync()
            first = await other.until("MESSAGES_SNAPSHOT")
            model.gate.set()
            await other.to_end()
            await other.sync()
            last = await other.to_end()
    assert first[0]["runId"] == "r-1"
    assert [m["content"] for m in first[1]["messages"]] == ["Hi"]
    assert [m["content"] for m in last[1]["messages"]] == ["Hi", "one two three four"]


async def test_shutting_down_closes_the_rows() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three four")
    async with Socket(session_id, user, agent, limits=RunLimits(grace=0)) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await get_run_manager().shutdown()
        events = await tab.to_end()
        assert await tab.closed() == 4503
        async with Socket(session_id, user, agent) as late:
            assert await late.closed() == 4503
    assert events[-1]["code"] == "interrupted"
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_id) == ("idle", "")
    assert [text for *_, text in await items_of(session_id)] == ["Hi", "one two"]


# -- who may ---------------------------------------------------------------------------


async def close_code(session_id: str, user: Any, **options: Any) -> int:
    async with Socket(session_id, user, speaker("no"), **options) as tab:
        return await tab.closed()


async def test_what_is_not_yours_does_not_exist() -> None:
    """quivr 3697, superset PR 5017 and others: guessing an id reads another's chat."""
    _, session_id = await conversation()
    stranger = await sync_to_async(make_user)()
    assert await close_code(session_id, stranger) == 4404
    assert await close_code("unknown", stranger) == 4404
    assert await close_code("x" * 300, stranger) == 4404
    assert await AgentSession.objects.filter(session_id="unknown").acount() == 0


async def test_the_logged_out_and_the_disabled_are_turned_away() -> None:
    user, session_id = await conversation()
    assert await close_code(session_id, AnonymousUser()) == 4401
    user.is_active = False
    await user.asave()
    assert await close_code(session_id, user) == 4401


async def test_a_log_out_is_noticed_at_the_next_run() -> None:
    """channels 718 and 1324: a logged-out user keeps the socket."""
    user, session_id = await conversation()

    def log_in() -> SessionStore:
        store = SessionStore()
        store[SESSION_KEY] = str(user.pk)
        store["_auth_user_backend"] = "django.contrib.auth.backends.ModelBackend"
        store["_auth_user_hash"] = user.get_session_auth_hash()
        store.save()
        return store

    store = await sync_to_async(log_in)()
    scope = {"session": store}
    async with Socket(session_id, user, speaker("yes", "no"), scope=scope) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"
        await sync_to_async(store.delete)(store.session_key)
        await tab.say("r-2", "Still here?")
        assert await tab.closed() == 4401
    assert not await AgentRun.objects.filter(run_id="r-2").aexists()


async def test_authorize_decides_at_connecting_and_before_each_run() -> None:
    user, session_id = await conversation()

    class Closing(AgentConsumer):
        open = True

        async def authorize(self, user: Any, session_id: str) -> bool:
            return type(self).open

    agent = speaker("yes")
    async with Socket(session_id, user, agent, consumer=Closing) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        Closing.open = False
        await tab.say("r-2", "Hi")
        assert await tab.closed() == 4403
    assert await close_code(session_id, user, consumer=Closing) == 4403


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (b"https://chat.example.com", True),
        (b"https://evil.example.org", False),
        (b"null", False),
    ],
)
async def test_a_page_of_another_origin_gets_no_socket(
    settings: Any, origin: bytes, allowed: bool
) -> None:
    """channels 364: websockets carry cookies across sites and have no CSRF token."""
    settings.ALLOWED_HOSTS = ["chat.example.com"]
    user, session_id = await conversation()
    tab = Socket(session_id, user, speaker(), headers=[(b"origin", origin)])
    connected, _ = await tab.communicator.connect()
    assert connected is allowed
    await tab.communicator.disconnect()


async def test_a_user_s_oldest_socket_makes_room_for_the_newest() -> None:
    user, session_id = await conversation()
    agent = speaker()
    async with Socket(session_id, user, agent, max_sockets=2) as first:
        # A seat is taken after the socket was accepted; an answer shows that it was.
        await first.sync()
        await first.to_end()
        async with Socket(session_id, user, agent, max_sockets=2) as second:
            await second.sync()
            await second.to_end()
            # The oldest may be one that nobody listens to any more, as of a phone that
            # has lost its network. So it goes, not the newest.
            async with Socket(session_id, user, agent, max_sockets=2) as third:
                assert await first.closed() == 4429
                for tab in (second, third):
                    await tab.sync()
                    await tab.to_end()


async def test_runs_are_counted_by_the_minute() -> None:
    early_in_the_minute()
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("1"), max_runs_per_minute=1) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.say("r-2", "Hi")
        assert (await tab.frame())["chunk"]["code"] == "rate_limited"


# -- bad frames ------------------------------------------------------------------------


async def test_three_bad_frames_close_the_socket() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker()) as tab:
        await tab.send("{")
        assert (await tab.frame())["chunk"]["code"] == "bad_request"
        await tab.say("r-1", "Hi", threadId="another")
        assert (await tab.frame())["chunk"]["code"] == "bad_request"
        await tab.communicator.send_to(bytes_data=b"{}")
        assert await tab.closed() == 4400


async def test_a_frame_too_large_closes_the_socket() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker()) as tab:
        # 64 KiB of UTF-8, not of characters.
        await tab.send(json.dumps({"text": "é" * 33_000}, ensure_ascii=False))
        assert await tab.closed() == 4413


async def test_a_refused_frame_leaves_the_socket_usable() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("fine")) as tab:
        await tab.say("r-1", "x" * 33_000)
        assert (await tab.frame())["chunk"]["code"] == "message_too_long"
        await tab.say("r-2", "short")
        assert text_of(await tab.to_end()) == "fine"


async def test_pings_come_by_themselves() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker(), ping_interval=0.02) as tab:
        output = await tab.communicator.receive_output(20)
    assert json.loads(output["text"]) == {"type": "ping"}


class Named(AgentConsumer):
    agent: Any = object()


class Choosing(AgentConsumer):
    async def get_agent(self) -> Any:
        return object()


class Computed(AgentConsumer):
    @property
    def agent(self) -> Any:  # type: ignore[override]
        return object()

    @property
    def backend(self) -> Any:  # type: ignore[override]
        return "default"


class Taking(Named):
    def __init__(self, *, tenant: str, **options: Any) -> None:
        super().__init__(**options)
        self.tenant = tenant


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        (Named, {"agnet": None}, InvalidConsumer, "got 'agnet'.*mean 'agent'"),
        (Named, {"_over": True}, InvalidConsumer, "got '_over'"),
        (Named, {"backend": "nowhere"}, InvalidBackend, "no alias 'nowhere'"),
        (AgentConsumer, {}, InvalidConsumer, r"as_asgi\(agent=…\), or override"),
        (AgentConsumer, {"agent": None}, InvalidConsumer, "has no agent"),
        (Named, {"agent": None}, InvalidConsumer, "Named has no agent"),
        (Taking, {"tenant": "a", "backend": "nowhere"}, InvalidBackend, "nowhere"),
        (Named, {"backend": None}, InvalidBackend, "no alias None"),
        (Named, {"agent": "support"}, InvalidConsumer, "can't import 'support'"),
        (Named, {"agent": Agent}, InvalidConsumer, r"goes into get_agent\(\)"),
        (Named, {"agent": lambda: None}, InvalidConsumer, r"goes into get_agent\(\)"),
        (Named, {"limits": {"max_turns": 2}}, InvalidConsumer, "is a RunLimits"),
        (Named, {"stream_options": None}, InvalidConsumer, "is a StreamOptions"),
        (Named, {"authorize": True}, InvalidConsumer, r"authorize\(\) is a method"),
    ],
)
def test_as_asgi_refuses_what_no_socket_could_use(
    kind: Any, options: dict[str, Any], error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        kind.as_asgi(**options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AgentConsumer, {"agent": Agent(name="support")}),
        (Named, {"backend": "default", "max_sockets": 1}),
        (Choosing, {}),
        (Computed, {}),
        (Taking, {"tenant": "a"}),
    ],
)
def test_as_asgi_takes_what_the_class_does(kind: Any, options: dict[str, Any]) -> None:
    assert kind.as_asgi(**options).consumer_initkwargs == options
    kind(**options)


def test_a_socket_refuses_what_its_own_class_passes_on() -> None:
    application = Taking.as_asgi(tenant="a", agnet=None)
    with pytest.raises(InvalidConsumer, match="got 'agnet'"):
        application.consumer_class(**application.consumer_initkwargs)


async def test_a_consumer_without_an_agent_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="override get_agent"):
        AgentConsumer().get_agent()
