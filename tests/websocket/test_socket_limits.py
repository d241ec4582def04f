"""How much one user may ask of the sockets, and what odd frames they send."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.cache import cache
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions import DjangoSession, get_session
from agent_sessions.agui import StreamOptions
from agent_sessions.backends.base import Page
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun
from agent_sessions.ratelimit import Rates
from agent_sessions.runs import Conversation, get_run_manager
from agent_sessions.runs.event_rows import About
from agent_sessions.runs.log import Frame
from agent_sessions.runs.pages import SNAPSHOT_BYTES, shown
from agent_sessions.runs.sync import Found, told_after
from tests.runs.test_runs import cashier
from tests.support.chat import Socket, create_conversation, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, speaker
from tests.websocket.test_sockets import seen_user

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


# -- how many --------------------------------------------------------------------------


async def test_a_user_has_so_many_sockets_over_all_conversations() -> None:
    user, first = await conversation()
    more = [await sync_to_async(create_conversation)(user) for _ in range(2)]
    ids = [first, *(row.session_id for row in more)]
    limit: Any = {"max_sockets_per_user": 2}
    async with Socket(ids[0], user, speaker(), **limit) as one:
        await seen_user(one)
        async with Socket(ids[1], user, speaker(), **limit) as two:
            await seen_user(two)
            async with Socket(ids[2], user, speaker(), **limit) as three:
                assert await one.closed() == 4429
                await seen_user(two)
                await seen_user(three)
                other, theirs = await conversation()
                async with Socket(theirs, other, speaker(), **limit) as tab:
                    await seen_user(tab)
                await seen_user(two)


async def test_tenants_users_of_one_key_have_seats_of_their_own() -> None:
    """A schema each, behind one alias: their tables differ, and nothing else."""

    class Elsewhere(AgentConsumer):
        async def _find(self, session_id: str) -> Conversation:
            return replace(await super()._find(session_id), table="other")

    user, session_id = await conversation()
    limits: Any = {"max_sockets_per_user": 1, "max_user_frames_per_minute": 1}
    async with (
        Socket(session_id, user, speaker(), **limits) as ours,
        Socket(session_id, user, speaker(), consumer=Elsewhere, **limits) as theirs,
    ):
        for tab in (ours, theirs):
            await tab.sync()
            assert (await tab.to_end())[-1]["type"] == "RUN_FINISHED"
        await ours.sync()
        assert (await ours.to_end())[-1]["code"] == "rate_limited"


async def test_a_phone_displaces_its_own_sockets_before_others() -> None:
    user, first = await conversation()
    second = (await sync_to_async(create_conversation)(user)).session_id
    limits: Any = {"max_sockets_per_user": 3, "max_sockets": 2}
    async with (
        Socket(first, user, speaker(), **limits) as live,
        Socket(second, user, speaker(), **limits) as one,
    ):
        await seen_user(live)
        await seen_user(one)
        async with Socket(second, user, speaker(), **limits) as two:
            await seen_user(two)
            async with Socket(second, user, speaker(), **limits) as three:
                assert await one.closed() == 4429
                await seen_user(three)
                await seen_user(two)
                await seen_user(live)


async def test_a_seat_is_free_when_its_socket_has_broken_off() -> None:
    """Channels calls no disconnect() where a handler raised."""

    class Broken(AgentConsumer):
        async def receive(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("a bug")

    user, session_id = await conversation()
    for _ in range(2):
        tab = Socket(session_id, user, speaker(), consumer=Broken, max_sockets=1)
        assert (await tab.communicator.connect())[0]
        await tab.say("r-1", "Hi")
        with pytest.raises(RuntimeError, match="a bug"):
            await tab.communicator.wait()
        assert not get_run_manager().seats.taken


@pytest.mark.parametrize("kind", ["sync", "abort"])
async def test_sync_and_abort_frames_are_counted(kind: str) -> None:
    user, session_id = await conversation()
    frame = {"type": kind} if kind == "sync" else {"type": kind, "runId": "r-1"}
    other = {"type": "abort", "runId": "r-1"} if kind == "sync" else {"type": "sync"}
    agent = speaker("yes")
    async with Socket(session_id, user, agent, max_frames_per_minute=2) as tab:
        for _ in range(2):
            await tab.send(frame)
            if kind == "sync":
                await tab.to_end()
        await tab.send(frame)
        refusal = (await tab.frame())["chunk"]
        assert refusal["code"] == "rate_limited"
        assert refusal.get("metadata") == (
            {"runId": "r-1"} if kind == "abort" else None
        )
        # Each has a share of its own, and runs are counted elsewhere.
        await tab.send(other)
        if kind == "abort":
            await tab.to_end()
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "yes"


async def test_the_frames_of_a_users_sockets_are_counted_together() -> None:
    user, session_id = await conversation()
    limit: Any = {"max_user_frames_per_minute": 3}
    for _ in range(3):
        async with Socket(session_id, user, speaker(), **limit) as tab:
            await seen_user(tab)
    async with Socket(session_id, user, speaker(), **limit) as tab:
        await tab.sync()
        assert (await tab.frame())["chunk"]["code"] == "rate_limited"
    other, theirs = await conversation()
    async with Socket(theirs, other, speaker(), **limit) as tab:
        await seen_user(tab)


async def test_addresses_of_images_are_refused_unless_allowed() -> None:
    user, session_id = await conversation()
    source = {"type": "url", "value": "http://169.254.169.254/latest"}
    content = [{"type": "image", "source": source}]
    frame = {
        "threadId": session_id,
        "runId": "r-1",
        "messages": [{"id": "u-1", "role": "user", "content": content}],
    }
    async with Socket(session_id, user, speaker("yes")) as tab:
        await tab.send(frame)
        refusal = (await tab.frame())["chunk"]
        assert (refusal["code"], refusal["metadata"]) == (
            "bad_request",
            {"runId": "r-1"},
        )
    async with Socket(session_id, user, speaker("yes"), allow_image_urls=True) as tab:
        await tab.send(frame)
        assert text_of(await tab.to_end()) == "yes"


async def test_forty_syncs_are_not_answered() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker()) as tab:
        for _ in range(40):
            await tab.sync()
        assert await tab.closed() == 4429
        # A closed socket says nothing more.
        assert await tab.silent(0.05)


async def test_frames_that_are_always_refused_close_the_socket() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker()) as tab:
        for number in range(10):
            await tab.say(f"r-{number}", "x" * 33_000)
            assert (await tab.frame())["chunk"]["code"] == "message_too_long"
        assert await tab.closed() == 4429


def test_a_share_is_whole_again_after_a_minute() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    assert [rates.take("a", 3) for _ in range(4)] == [True, True, True, False]
    assert rates.take("b", 3)
    now = 19.9
    assert not rates.take("a", 3)
    now = 20.1
    assert rates.take("a", 3)
    assert not rates.take("a", 3)
    now = 1_000.0
    assert [rates.take("a", 3) for _ in range(4)] == [True, True, True, False]


def test_shares_are_forgotten_once_they_are_whole() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    for user in range(1_000):
        rates.take(user, 3)
    now = 61.0
    rates.take("a", 3)
    assert len(rates) == 1
    assert not Rates(lambda: now).take("a", 0)


# -- how large a snapshot is -----------------------------------------------------------


def long_items(number: int, size: int = 32_000) -> list[Any]:
    return [
        {"role": "user", "content": f"{n} ".ljust(size, "é")} for n in range(number)
    ]


def message_bytes(event: Any) -> int:
    return len(json.dumps(event["messages"], separators=(",", ":")))


async def assert_newest(session: Any, event: Any, count: int) -> None:
    """Assert that a snapshot has the newest messages that fit, and a cursor."""
    assert message_bytes(event) <= SNAPSHOT_BYTES
    numbers = [int(m["content"].split()[0]) for m in event["messages"]]
    assert numbers == list(range(count - len(numbers), count))
    earlier = await session.backend.apage(
        session.key, before=int(event["metadata"]["before"])
    )
    assert earlier.items[-1].item is not None
    last = earlier.items[-1].item["content"]
    assert int(last.split()[0]) == count - len(numbers) - 1
    oldest = len(json.dumps(event["messages"][0]))
    assert message_bytes(event) + oldest > SNAPSHOT_BYTES - 100


async def test_a_snapshot_has_the_newest_messages_that_fit() -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    await session.add_items(long_items(30))
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        _, snapshot, _ = await tab.to_end()
    assert snapshot["messages"]
    await assert_newest(session, snapshot, 30)


async def test_a_snapshot_in_the_middle_of_a_run_is_no_larger() -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    await session.add_items(long_items(30))
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        async with Socket(session_id, user, agent) as other:
            await other.sync()
            _, snapshot = await other.until("MESSAGES_SNAPSHOT")
            model.gate.set()
            assert text_of(await other.to_end()) == "one two three"
    assert message_bytes(snapshot) <= SNAPSHOT_BYTES
    # What the run answers comes last.
    assert snapshot["messages"].pop()["content"] == "Hi"
    await assert_newest(session, snapshot, 30)


async def test_a_snapshot_at_a_pause_is_no_larger() -> None:
    user, session_id = await conversation()
    await DjangoSession(session_id, user=user).add_items(long_items(30))
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        events = await tab.to_end()
        (snapshot,) = (e for e in events if e["type"] == "MESSAGES_SNAPSHOT")
        assert snapshot["messages"][-1]["role"] == "assistant"
        assert message_bytes(snapshot) <= SNAPSHOT_BYTES
        assert snapshot["metadata"]["before"]


async def test_a_message_larger_than_a_snapshot_is_told_by_its_cursor() -> None:
    user, session_id = await conversation()
    session = get_session(session_id, user=user)
    await session.add_items(long_items(2, 200_000))
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        _, snapshot, _ = await tab.to_end()
    assert snapshot["messages"] == []
    page = await session.backend.apage(
        session.key, before=int(snapshot["metadata"]["before"])
    )
    assert len(page.items) == 2


def test_an_empty_page_has_no_cursor() -> None:
    messages, about = shown(Page([], has_earlier=False), StreamOptions())
    assert (messages, about["before"]) == ([], None)


# -- odd frames ------------------------------------------------------------------------

OFFSETS = [
    "r-1:" + "9" * 5_000,
    "r-1:" + "9" * 60_000,
    "r-1:-1",
    "r-1:+1",
    "r-1: 1",
    "r-1:1_0",
    "r-1:1.5",
    "r-1:1e3",
    "r-1:²",
    "r-1:\u0661",
    "r-1:\uff11",
    "r-1:\n1",
    "r-1:1\n",
    "r-1:",
    ":1",
    ":",
    "r-1:1:1",
    "r-1",
    "\ud800:1",
    "r-1:\ud800",
    "\x00",
    "r-1:999999999999999999",
]


@pytest.mark.one_database
@pytest.mark.parametrize("offset", OFFSETS, ids=range(len(OFFSETS)))
async def test_an_offset_of_any_shape_is_unknown(offset: str) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("yes")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.sync(offset)
        events = await tab.to_end()
        assert [event["type"] for event in events] == [
            "RUN_STARTED",
            "MESSAGES_SNAPSHOT",
            "RUN_FINISHED",
        ]


@given(st.text(st.characters(exclude_categories=())), st.integers())
def test_no_offset_breaks_a_replay(text: str, number: int) -> None:
    frame = Frame("r-1", 1, {"type": "RUN_STARTED", "runId": "r-1"})
    found = Found("r-1", AgentRun(run_id="r-1"), [frame], About(), [], {})
    for offset in (text, f"r-1:{text}", f"r-1:{number}", f"r-1:{'1' * len(text)}"):
        told_after(found, offset)
    exact = told_after(found, "r-1:0")
    assert exact is not None
    assert [frame.id for frame in exact.frames] == ["r-1:1"]


BAD = [
    '{"type":"sync","offset":' + "9" * 5_000 + "}",
    '{"type":"sync","offset":1}',
    '{"type":"sync","offset":1.5}',
    '{"type":"sync","offset":NaN}',
    '{"type":"sync","offset":1e999}',
    '{"type":"sync","offset":["r-1:1"]}',
    '{"type":"sync","offset":{}}',
    '{"type":"sync","offset":true}',
    '{"type":' + "[" * 60_000,
    "[" * 30_000 + "]" * 30_000,
    '{"a":' * 10_000 + "1" + "}" * 10_000,
    '{"type":"abort"}',
    '{"type":"abort","runId":"\\ud800"}',
    '{"type":"abort","runId":"r\\u0000"}',
    '{"type":"abort","runId":' + "9" * 5_000 + "}",
    '{"type":"abort","runId":"r-1","mode":NaN}',
    '{"type":["sync"]}',
    '{"type":' + "1" * 5_000 + "}",
    '{"type":"sync","type":"hello"}',
    '{"threadId":"t","runId":-Infinity}',
    "\ud800",
    "\ufeff{}",
    "\x00",
    "null",
    '"sync"',
    "-",
]


@pytest.mark.one_database
@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
async def test_a_frame_of_any_shape_is_refused(text: str) -> None:
    user, session_id = await conversation()
    agent = speaker("yes")
    async with Socket(session_id, user, agent) as tab:
        for _ in range(2):
            await tab.send(text)
            assert (await tab.frame())["chunk"]["code"] == "bad_request"
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"
        await tab.send(text)
        assert (await tab.frame())["chunk"]["code"] == "bad_request"
        assert await tab.closed() == 4400


@pytest.mark.parametrize(
    "more",
    [
        {"forwardedProps": {"deep": float("inf"), "text": "\ud800\x00"}},
        {"state": 10**400, "tools": "\ud800", "context": None},
        {"messages": [{"id": "\ud800\x00", "role": "user", "content": "Hi\ud800\x00"}]},
    ],
)
async def test_what_is_odd_in_a_run_does_not_stop_it(more: dict[str, Any]) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("yes")) as tab:
        if "forwardedProps" in more:
            text = json.dumps(more["forwardedProps"]).replace("Infinity", "1e999")
            message = {"id": "u", "role": "user", "content": "Hi"}
            run = {"threadId": session_id, "runId": "r-1", "messages": [message]}
            await tab.send(f'{json.dumps(run)[:-1]},"forwardedProps":{text}}}')
        else:
            await tab.say("r-1", "Hi", **more)
        assert text_of(await tab.to_end()) == "yes"


@pytest.mark.parametrize("interrupt", ["\ud800", "\x00", "x" * 60_000])
async def test_an_answer_to_an_approval_of_any_name_is_refused(interrupt: str) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        payload = {"approved": True}
        entry = {"interruptId": interrupt, "status": "resolved", "payload": payload}
        await tab.answer("r-2", entry)
        assert (await tab.frame())["chunk"]["code"] == "unknown_interrupt"
