"""Edit, regenerate and switch: on both wires, in all tabs, from any process."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agent_sessions import DjangoSession
from agent_sessions.backends.base import make_key
from agent_sessions.consumers import AgentConsumer
from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.runs.pages import told_of
from agent_sessions.runs.setup import Conversation
from tests.encryption.test_encryption import NEW
from tests.runs.test_runs import cashier
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.gated import gated
from tests.support.streams import Http

pytestmark = pytest.mark.django_db(transaction=True)

Event = dict[str, Any]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def speaker(*texts: str) -> Agent[Any]:
    steps = [[assistant_message(text)] for text in texts]
    return Agent(name="speaker", model=ScriptedModel(steps))


async def conversation() -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    return user, row.session_id


async def edit(tab: Socket, run_id: str, message_id: str, text: str) -> None:
    await tab.say(run_id, text, **ours(edit={"messageId": message_id}))


def ours(**asked: Any) -> dict[str, Any]:
    return {"forwardedProps": {"agentSessions": asked}}


async def ask(tab: Socket, run_id: str, **asked: Any) -> None:
    """Send a frame that says nothing new."""
    frame = {"threadId": tab.session_id, "runId": run_id, "messages": []}
    await tab.send({**frame, **ours(**asked)})


def snapshot_of(events: list[Event]) -> Event:
    return [event for event in events if event["type"] == "MESSAGES_SNAPSHOT"][-1]


def said(events: list[Event]) -> list[str]:
    return [message["content"] for message in snapshot_of(events)["messages"]]


def places(events: list[Event]) -> list[Any]:
    """Return the place and the count of each user's message."""
    found = []
    for message in snapshot_of(events)["messages"]:
        if message["role"] == "user":
            siblings = message.get("metadata", {}).get("siblings")
            found.append(siblings and (siblings["place"], siblings["count"]))
    return found


def beside(events: list[Event], index: int) -> dict[str, Any]:
    users = [m for m in snapshot_of(events)["messages"] if m["role"] == "user"]
    siblings: dict[str, Any] = users[index]["metadata"]["siblings"]
    return siblings


async def shown(tab: Socket) -> list[Event]:
    await tab.sync()
    return await tab.to_end()


# -- edit and regenerate ---------------------------------------------------------------


async def test_an_edited_message_is_asked_on_a_branch_of_its_own() -> None:
    user, session_id = await conversation()
    agent = speaker("one", "two", "two again")
    async with Socket(session_id, user, agent) as tab:
        for number, text in enumerate(("first", "second")):
            await tab.say(f"r-{number}", text)
            await tab.to_end()
        await edit(tab, "r-2", "u-r-1", "second, better")
        events = await tab.to_end()
        assert text_of(events) == "two again"
        assert said(events) == ["first", "one", "second, better"]
        assert places(events) == [None, (2, 2)]
        again = await shown(tab)
    assert said(again) == ["first", "one", "second, better", "two again"]
    assert places(again) == [None, (2, 2)]
    assert beside(again, 1)["previous"] == "main"
    users = [m for m in snapshot_of(again)["messages"] if m["role"] == "user"]
    assert [message["id"] for message in users] == ["u-r-0", "u-r-2"]
    assert isinstance(agent.model, ScriptedModel)
    asked = [item.get("content") for item in agent.model.calls[-1].input]
    assert "second" not in asked
    assert "second, better" in asked


async def test_the_last_message_is_asked_again() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "other")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await ask(tab, "r-2", regenerate=True)
        events = await tab.to_end()
        again = await shown(tab)
    assert events[0]["input"]["messages"][0]["content"] == "Hi"
    assert text_of(events) == "other"
    assert said(again) == ["Hi", "other"]
    assert places(again) == [(2, 2)]
    rows = SessionItem.objects.filter(branch__session__session_id=session_id)
    assert await rows.acount() == 4


async def test_the_first_message_is_edited_again_and_again() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker(*"abcd")) as tab:
        await tab.say("r-0", "0")
        await tab.to_end()
        for number in (1, 2, 3):
            await edit(tab, f"r-{number}", f"u-r-{number - 1}", str(number))
            await tab.to_end()
        events = await shown(tab)
        assert places(events) == [(4, 4)]
        seen = [said(events)[0]]
        while "previous" in beside(events, 0):
            await ask(tab, f"s-{len(seen)}", branch=beside(events, 0)["previous"])
            events = await tab.to_end()
            seen.append(said(events)[0])
    assert seen == ["3", "2", "1", "0"]
    assert places(events) == [(1, 4)]
    assert beside(events, 0).keys() == {"place", "count", "next"}


async def test_a_branch_of_a_branch_has_the_turns_of_both() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker(*"abcde")) as tab:
        for run_id in ("1", "2"):
            await tab.say(run_id, run_id)
            await tab.to_end()
        await edit(tab, "2b", "u-2", "2b")
        await tab.to_end()
        await edit(tab, "1b", "u-1", "1b")
        await tab.to_end()
        first = await shown(tab)
        assert places(first) == [(2, 2)]
        await ask(tab, "s", branch=beside(first, 0)["previous"])
        older = await tab.to_end()
        assert said(older) == ["1", "a", "2", "b"]
        assert places(older) == [(1, 2), (1, 2)]
        await ask(tab, "t", branch=beside(older, 1)["next"])
        newer = await tab.to_end()
    assert said(newer) == ["1", "a", "2b", "c"]
    assert places(newer) == [(1, 2), (2, 2)]


async def test_a_message_of_no_run_is_edited_by_its_position() -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    items: Any = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "imported", "id": "msg_0123456789abcdef0123"},
        {"role": "assistant", "content": "answer"},
    ]
    await session.add_items(items)
    async with Socket(session_id, user, speaker("a", "b")) as tab:
        await edit(tab, "r-1", "msg_0123456789abcdef0123", "imported, better")
        assert said(await tab.to_end()) == ["old", "answer", "imported, better"]
        await edit(tab, "r-2", "item-1", "new")
        assert said(await tab.to_end()) == ["new"]


async def test_a_repeated_edit_is_answered_from_the_log() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await edit(tab, "r-2", "u-r-1", "Hello")
        first = await tab.to_end()
        await edit(tab, "r-2", "u-r-1", "Hello")
        assert await tab.to_end() == first
    assert await Branch.objects.acount() == 2


async def test_a_fork_copies_nothing_and_asks_the_same_of_any_history() -> None:
    user = await sync_to_async(make_user)()
    counted = []
    for length in (4, 200):
        row = await sync_to_async(create_conversation)(user)
        session = DjangoSession(row.session_id, user=user)
        pair: Any = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
        await session.add_items(pair * length)
        where = Conversation(
            row.pk, sessions["default"], make_key(row.session_id, user)
        )
        async with Socket(row.session_id, user, speaker("x", "y")) as tab:
            await ask(tab, "r-1", regenerate=True)
            await tab.to_end()
        own = SessionItem.objects.filter(branch__session=row).exclude(
            branch__name="main"
        )
        assert await own.acount() == 2
        counted.append(await sync_to_async(count_reads)(where))
    assert counted[0] == counted[1]


def count_reads(conversation: Conversation) -> int:
    with CaptureQueriesContext(connection) as queries:
        page = conversation.backend.page(conversation.key, limit=100)
        page = told_of(page, conversation)
    assert page.items[-2].siblings
    return len(queries)


async def test_many_siblings_are_found_in_one_query() -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    pair: Any = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    await session.add_items(pair * 3)
    row = await AgentSession.objects.aget(session_id=session_id)
    where = Conversation(row.pk, sessions["default"], make_key(session_id, user))
    counted = []
    for count in (2, 12):
        for _ in range(count):
            await session.create_branch_from_turn(3)
            await session.add_items(pair)
        counted.append(await sync_to_async(count_reads)(where))
    assert counted[0] == counted[1]
    page = await sync_to_async(told_of)(
        await where.backend.apage(where.key, limit=2), where
    )
    found = page.items[0].siblings
    assert found is not None
    assert (found["place"], found["count"]) == (15, 15)


async def test_a_page_that_begins_with_a_message_tells_its_siblings() -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    turn: Any = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    await session.add_items(turn)
    await session.add_items(turn[:1])
    # Its position is not given again.
    await session.pop_item()
    await session.add_items(turn)
    async with Socket(session_id, user, speaker("x")) as tab:
        await ask(tab, "r-1", regenerate=True)
        await tab.to_end()
    await session.switch_to_branch("main")
    row = await AgentSession.objects.aget(session_id=session_id)
    where = Conversation(row.pk, sessions["default"], make_key(session_id, user))
    page = await where.backend.apage(where.key, limit=2)
    page = await sync_to_async(told_of)(page, where)
    found = page.items[0].siblings
    assert found is not None
    assert (found["place"], found["count"]) == (1, 2)


# -- refusals --------------------------------------------------------------------------


async def refused(tab: Socket) -> tuple[str, str]:
    [event] = await tab.until("RUN_ERROR")
    return event["code"], event["metadata"]["runId"]


async def test_what_is_not_there_is_refused_and_changes_nothing() -> None:
    user, session_id = await conversation()
    other, others = await conversation()
    async with Socket(others, other, speaker("theirs")) as tab:
        await tab.say("theirs", "theirs")
        await tab.to_end()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        await ask(tab, "r-0", regenerate=True)
        assert await refused(tab) == ("unknown_message", "r-0")
        await tab.say("r-1", "Hi")
        await tab.to_end()
        answer = (await shown(tab))[1]["messages"][1]["id"]
        odd = ("u-theirs", "u-", "item-2", "item-99", "item-²", "%", answer, "x" * 255)
        for number, message_id in enumerate(odd):
            await edit(tab, f"e-{number}", message_id, "Hello")
            assert await refused(tab) == ("unknown_message", f"e-{number}")
        await ask(tab, "b", branch="nowhere")
        assert await refused(tab) == ("unknown_branch", "b")
        await tab.say("r-2", "still works")
        assert text_of(await tab.to_end()) == "two"
    assert await Branch.objects.filter(session__session_id=session_id).acount() == 1
    assert await AgentRun.objects.filter(session__session_id=session_id).acount() == 2


async def test_while_a_run_goes_on_nothing_forks_and_nothing_switches() -> None:
    user, session_id = await conversation()
    agent, model = gated("a b c d")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        async with Socket(session_id, user, agent) as other:
            await edit(other, "e", "u-r-1", "Hello")
            assert await refused(other) == ("session_busy", "e")
            await ask(other, "b", branch="main")
            assert await refused(other) == ("session_busy", "b")
        model.gate.set()
        assert (await tab.to_end())[-1]["outcome"] == {"type": "success"}


async def test_too_many_switches_are_refused() -> None:
    user, session_id = await conversation()
    options: Any = {"max_frames_per_minute": 2}
    async with Socket(session_id, user, speaker("one"), **options) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        for run_id in "ab":
            await ask(tab, run_id, branch="main")
            await tab.to_end()
        await ask(tab, "c", branch="main")
        assert await refused(tab) == ("rate_limited", "c")


async def test_a_store_without_branches_says_so(settings: Any) -> None:
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"},
        "private": {
            "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
            "OPTIONS": {"backend": "default", "keys": [NEW]},
        },
    }
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend="private")
    options: Any = {"backend": "private"}
    async with Socket(row.session_id, user, speaker("one"), **options) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["outcome"] == {"type": "success"}
        for run_id, asked in (
            ("a", {"regenerate": True}),
            ("b", {"branch": "main"}),
        ):
            await ask(tab, run_id, **asked)
            assert await refused(tab) == ("branches_unsupported", run_id)
        assert places(await shown(tab)) == [None]


# -- all tabs --------------------------------------------------------------------------


async def test_every_tab_sees_a_fork_and_a_switch() -> None:
    user, session_id = await conversation()
    agent = speaker("one", "two", "three")
    async with (
        Socket(session_id, user, agent) as tab,
        Socket(session_id, user, agent) as other,
    ):
        await shown(other)
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await other.to_end()
        await edit(tab, "r-2", "u-r-1", "Hello")
        await tab.to_end()
        assert said(await other.to_end()) == ["Hello"]
        await ask(tab, "s", branch="main")
        assert said(await tab.to_end()) == ["Hi", "one"]
        assert said(await other.to_end()) == ["Hi", "one"]
        # One who was away has heard the last run, but not the switch.
        async with Socket(session_id, user, agent) as third:
            await third.sync(tab.frames[-4]["id"])
            assert said(await third.to_end()) == ["Hi", "one"]
        await tab.say("r-3", "more")
        assert text_of(await tab.to_end()) == "three"
        assert text_of(await other.to_end()) == "three"
        assert await tab.silent(1.2)
        assert await other.silent()


async def test_a_switch_by_code_reaches_the_tabs() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.say("r-2", "Bye")
        await tab.to_end()
        await shown(tab)
        await DjangoSession(session_id, user=user).fork(1)
        events = await tab.to_end()
        assert said(events) == ["Hi", "one"]
        assert snapshot_of(events)["metadata"]["siblings"] == {
            "place": 2,
            "count": 2,
            "previous": "main",
        }


async def test_the_same_over_http() -> None:
    user, session_id = await conversation()
    agent = speaker("one", "two")
    async with Http(session_id, agent) as http:
        await http.login(user)
        await (await http.run("r-1", "Hi")).to_end()
        edited = await http.run("r-2", "Hello", **ours(edit={"messageId": "u-r-1"}))
        assert said(await edited.to_end()) == ["Hello"]
        back = await http.send(runId="s", messages=[], **ours(branch="main"))
        events = await back.to_end()
        assert said(events) == ["Hi", "one"]
        assert places(events) == [(1, 2)]
        unknown = await http.send(runId="t", messages=[], **ours(branch="x"))
        assert (await unknown.to_end())[-1]["code"] == "unknown_branch"
        unknown = await http.run("e", "Hello", **ours(edit={"messageId": "x"}))
        assert (await unknown.to_end())[-1]["code"] == "unknown_message"


# -- what goes wrong -------------------------------------------------------------------


async def test_a_run_that_dies_before_its_message_leaves_the_other_branch_in_reach() -> (
    None
):
    class Broken(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            if self.breaks:
                raise RuntimeError("before anything is stored")
            return session

        breaks = False

    user, session_id = await conversation()
    agent = speaker("one", "two")
    async with Socket(session_id, user, agent, consumer=Broken) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    async with Socket(session_id, user, agent, consumer=Broken, breaks=True) as tab:
        await edit(tab, "r-2", "u-r-1", "Hello")
        assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        events = await shown(tab)
        assert said(events) == []
        left = snapshot_of(events)["metadata"]["siblings"]
        assert left == {"place": 2, "count": 2, "previous": "main"}
    async with Socket(session_id, user, agent, consumer=Broken) as tab:
        await tab.say("r-3", "Hello")
        await tab.to_end()
        events = await shown(tab)
        assert said(events) == ["Hello", "two"]
        assert places(events) == [(2, 2)]


async def test_the_agent_is_the_one_of_the_branch() -> None:
    """A handoff on one branch is none on another."""
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker(*"abc")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        runs = AgentRun.objects.filter(session__session_id=session_id)
        await runs.aupdate(agent_name="billing")
        await AgentSession.objects.filter(session_id=session_id).aupdate(
            agent_name="billing"
        )
        await edit(tab, "r-2", "u-r-1", "Hello")
        await tab.to_end()
        row = await AgentSession.objects.aget(session_id=session_id)
        assert row.agent_name == "speaker"
        await ask(tab, "s", branch="main")
        await tab.to_end()
        await row.arefresh_from_db()
        assert row.agent_name == "billing"
        # Its runs end at the same positions as those of the other.
        forked = await Branch.objects.aget(runs__run_id="r-2")
        await ask(tab, "t", branch=forked.name)
        await tab.to_end()
        await row.arefresh_from_db()
        assert row.agent_name == "speaker"


async def test_a_run_that_fails_on_one_branch_is_none_of_another() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        # The model has no more to say.
        await edit(tab, "r-2", "u-r-1", "Hello")
        assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        await ask(tab, "s", branch="main")
        events = await tab.to_end()
        assert said(events) == ["Hi", "one"]
        assert events[-1]["outcome"] == {"type": "success"}
    async with Socket(session_id, user, speaker("two", "three")) as tab:
        # The same words are no retry here, but they are there.
        await tab.say("r-3", "Hi")
        await tab.to_end()
        assert said(await shown(tab)) == ["Hi", "one", "Hi", "two"]
        forked = await Branch.objects.aget(runs__run_id="r-2")
        await ask(tab, "t", branch=forked.name)
        await tab.to_end()
        await tab.say("r-4", "Hello")
        await tab.to_end()
        assert said(await shown(tab)) == ["Hello", "three"]


@pytest.mark.parametrize("leaves", ["edit", "fork"])
async def test_what_waits_on_a_branch_that_was_left_is_closed(leaves: str) -> None:
    """There, or where its turn is shown on another branch."""
    user, session_id = await conversation()
    async with Socket(session_id, user, cashier()) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
    agent = speaker("two", "three")
    async with Socket(session_id, user, agent) as tab:
        if leaves == "fork":
            await DjangoSession(session_id, user=user).fork(1)
        else:
            await edit(tab, "r-2", "u-r-1", "Hello")
            await tab.to_end()
            await ask(tab, "s", branch="main")
            await tab.to_end()
        await tab.say("r-3", "And now?")
        await tab.to_end()
    assert isinstance(agent.model, ScriptedModel)
    told = [item.get("output") for item in agent.model.calls[-1].input]
    assert "Tool execution was not approved." in told
