"""OpenAIConversationsBackend and its session beyond the contract suite."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, Runner
from agents.memory import OpenAIConversationsSession as SDKConversationsSession
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.db import transaction
from django.test import override_settings
from openai import AsyncOpenAI

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.openai import OpenAIConversationsBackend
from agent_sessions.backends.openai.backend import Remote
from agent_sessions.backends.reading import afind_head
from agent_sessions.exceptions import (
    HistoryGone,
    InvalidBackend,
    LeaseLost,
    PartlyWritten,
    SessionDoesNotExist,
    StorageError,
    StoreBusy,
    StoreRefused,
    StoreUnavailable,
)
from agent_sessions.memory.openai import ConversationSession, OpenAIConversationsSession
from agent_sessions.models import AgentSession, PendingClear
from agent_sessions.retention import pending
from tests.servers.conversations import KEY, ConversationsServer, conversations_server
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.documents import ROOT, blocks, column

pytestmark = [pytest.mark.one_database]


@pytest.fixture(scope="module")
def running() -> Iterator[ConversationsServer]:
    with conversations_server() as server:
        yield server


def options(server: ConversationsServer, **more: Any) -> dict[str, Any]:
    return {"base_url": server.url, "api_key": KEY, **more}


@pytest.fixture
def server(running: ConversationsServer) -> Iterator[ConversationsServer]:
    running.reset()
    setting = {
        "default": {"BACKEND": OpenAIConversationsBackend, "OPTIONS": options(running)}
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield running


def opened(session_id: str, **given: Any) -> ConversationSession:
    session: Any = get_session(session_id, **given)
    assert isinstance(session, ConversationSession)
    return session


def said(*numbers: int) -> list[Any]:
    return [{"role": "user", "content": f"item {number}"} for number in numbers]


def texts(items: Any) -> list[str]:
    return [item["content"][0]["text"] for item in items]


def row(session: Any) -> AgentSession:
    return AgentSession.objects.get(session_id=session.session_id)


async def arow(session: Any) -> AgentSession:
    return await AgentSession.objects.aget(session_id=session.session_id)


# -- the remote conversation -----------------------------------------------------------


@pytest.mark.django_db
async def test_the_session_is_the_sdks_own(server: ConversationsServer) -> None:
    session = opened("s-own")
    assert isinstance(session, SDKConversationsSession)
    assert session.session_id == "s-own"
    assert await session.conversation_id() is None
    assert server.requests == []
    await session.add_items(said(1))
    remote = await session.conversation_id()
    assert list(server.conversations) == [remote]
    assert (await arow(session)).remote_id == remote
    # The SDK's own names.
    assert await session._get_session_id() == remote
    await session._clear_session_id()
    assert await session.conversation_id() is None
    assert remote in server.conversations


@pytest.mark.django_db
async def test_the_mapping_is_kept_across_restarts(server: ConversationsServer) -> None:
    await opened("s-restart").add_items(said(1))
    sessions.reset()
    again = opened("s-restart")
    assert texts(await again.get_items()) == ["item 1"]
    await again.add_items(said(2))
    assert server.made == 1


@pytest.mark.django_db
async def test_reading_makes_no_conversation(server: ConversationsServer) -> None:
    session = opened("s-read")
    assert await session.get_items() == []
    assert await session.pop_item() is None
    await session.clear_session()
    assert server.requests == []


@pytest.mark.django_db(transaction=True)
def test_first_writers_make_one_conversation(server: ConversationsServer) -> None:
    """Threads that write first all at once: the losers delete what they made."""
    barrier = threading.Barrier(6)
    failures: list[BaseException] = []

    async def write(number: int) -> None:
        session = opened("s-race")
        await sync_to_async(barrier.wait, thread_sensitive=False)()
        await session.add_items(said(number))

    def work(number: int) -> None:
        try:
            asyncio.run(write(number))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=[n]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sessions.reset()
    assert failures == []
    assert list(server.conversations) == [row(opened("s-race")).remote_id]
    (history,) = server.conversations.values()
    assert sorted(texts(history)) == [f"item {number}" for number in range(6)]


@pytest.mark.django_db
async def test_a_lost_race_deletes_its_surplus(server: ConversationsServer) -> None:
    """Another process's conversation appears while ours is made: ours goes."""
    backend = sessions["default"]
    assert isinstance(backend, OpenAIConversationsBackend)
    key = SessionKey("s-lost")
    theirs = await other_client(server)
    await sync_to_async(backend.directory.ensure)(key)
    found = await backend.find(key)
    assert found == Remote()
    await AgentSession.objects.filter(session_id="s-lost").aupdate(remote_id=theirs)
    assert await backend._make(key) is None
    assert list(server.conversations) == [theirs]
    assert await backend.open(key) == theirs


async def other_client(server: ConversationsServer) -> str:
    async with AsyncOpenAI(api_key=KEY, base_url=server.url) as client:
        return (await client.conversations.create()).id


# -- clear -----------------------------------------------------------------------------


@pytest.mark.django_db
async def test_clear_deletes_and_forgets(server: ConversationsServer) -> None:
    session = opened("s-clear")
    await session.add_items(said(1, 2))
    first = await session.conversation_id()
    await session.clear_session()
    assert server.conversations == {}
    assert (await arow(session)).remote_id == ""
    await session.add_items(said(3))
    assert texts(await session.get_items()) == ["item 3"]
    assert await session.conversation_id() != first


@pytest.mark.django_db
async def test_a_clear_that_fails_forgets_nothing(server: ConversationsServer) -> None:
    session = opened("s-clear-fails")
    await session.add_items(said(1))
    remote = await session.conversation_id()
    server.fail(method="DELETE", status=500)
    with pytest.raises(StoreUnavailable, match="status 500, code fault"):
        await session.clear_session()
    assert (await arow(session)).remote_id == remote
    assert texts(await session.get_items()) == ["item 1"]
    await session.clear_session()
    assert server.conversations == {}


@pytest.mark.django_db
async def test_a_clear_whose_process_died_is_finished(
    server: ConversationsServer,
) -> None:
    """The row says from when to when a deletion is under way."""
    session = opened("s-clear-died")
    await session.add_items(said(1))
    remote = await session.conversation_id()
    rows = AgentSession.objects.filter(session_id=session.session_id)
    await rows.aupdate(remote_deleting=True)
    assert await session.conversation_id() == remote
    assert texts(await session.get_items()) == ["item 1"]
    await session.add_items(said(2))
    assert texts(await session.get_items()) == ["item 2"]
    assert remote not in server.conversations
    # And died only just after the deletion:
    remote = await session.conversation_id()
    assert remote is not None
    await rows.aupdate(remote_deleting=True)
    del server.conversations[remote]
    assert await session.get_items() == []
    assert await session.pop_item() is None
    await session.clear_session()
    assert (await arow(session)).remote_id == ""


@pytest.mark.django_db
async def test_deleted_at_openai(server: ConversationsServer) -> None:
    """It is an error that says what to do, and no empty history; clear mends it."""
    session = opened("s-gone")
    await session.add_items(said(1))
    server.conversations.clear()
    for call in (session.get_items, session.pop_item):
        with pytest.raises(HistoryGone, match=r"status 404.*Clear the session"):
            await call()
    with pytest.raises(HistoryGone):
        await session.add_items(said(2))
    await session.clear_session()
    await session.add_items(said(3))
    assert texts(await session.get_items()) == ["item 3"]


@pytest.mark.django_db
async def test_a_history_cleared_elsewhere_meanwhile(
    server: ConversationsServer,
) -> None:
    """A batch whose conversation another process clears goes into the next one."""
    session = opened("s-meanwhile")
    await session.add_items(said(1))
    old = await session.conversation_id()
    assert old is not None
    rows = AgentSession.objects.filter(session_id=session.session_id)
    backend = sessions["default"]
    assert isinstance(backend, OpenAIConversationsBackend)
    find = backend.find

    async def find_late(key: SessionKey) -> Remote | None:
        found = await find(key)
        if found == Remote(old):
            await rows.aupdate(remote_id="")
            server.conversations.pop(old, None)
        return found

    backend.find = find_late  # type: ignore[method-assign]
    await session.add_items(said(2))
    assert texts(await session.get_items()) == ["item 2"]
    assert old not in server.conversations


# -- writes ----------------------------------------------------------------------------


def creates(server: ConversationsServer) -> int:
    return sum(
        1 for method, path in server.requests if method == "POST" and "items" in path
    )


@pytest.mark.django_db
async def test_batches_of_20_and_pages_of_100(server: ConversationsServer) -> None:
    session = opened("s-batches")
    await session.add_items(said(*range(245)))
    assert creates(server) == 13
    server.requests.clear()
    assert texts(await session.get_items()) == [f"item {n}" for n in range(245)]
    assert len(server.requests) == 3
    server.requests.clear()
    assert len(await session.get_items(limit=150)) == 150
    assert len(await session.get_items(limit=7)) == 7
    assert len(server.requests) == 3


@pytest.mark.django_db
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 0}])
async def test_a_write_whose_answer_is_lost_is_not_sent_again(
    server: ConversationsServer, fault: dict[str, Any]
) -> None:
    session = opened("s-lost-answer")
    await session.add_items(said(1))
    server.requests.clear()
    server.fail(method="POST", path="/items", after=True, **fault)
    with pytest.raises(StoreUnavailable, match="may have arrived"):
        await session.add_items(said(2))
    assert creates(server) == 1
    assert texts(await session.get_items()) == ["item 1", "item 2"]
    assert not server.faults


@pytest.mark.django_db
async def test_a_time_out_is_not_sent_again(running: ConversationsServer) -> None:
    running.reset()
    setting = {
        "default": {
            "BACKEND": OpenAIConversationsBackend,
            "OPTIONS": options(running, timeout=0.2),
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = opened("s-time-out")
        await session.add_items(said(1))
        running.fail(method="POST", path="/items", seconds=0.6, status=None)
        with pytest.raises(StoreUnavailable, match=r"in time.*'timeout'.*may have"):
            await session.add_items(said(2))
        assert creates(running) == 2
        running.fail(method="DELETE", seconds=0.6, status=None)
        with pytest.raises(StoreUnavailable, match="may have arrived"):
            await session.pop_item()


@pytest.mark.django_db
async def test_nobody_listens(server: ConversationsServer) -> None:
    setting = {
        "default": {
            "BACKEND": OpenAIConversationsBackend,
            "OPTIONS": options(server, base_url="http://127.0.0.1:9/v1"),
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        with pytest.raises(StoreUnavailable, match=r"base_url'. Nothing was sent"):
            await opened("s-nobody").add_items(said(1))
        assert await opened("s-nobody").get_items() == []


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("header", "value"), [("Retry-After", "0.01"), ("retry-after-ms", "10")]
)
async def test_429_waits_and_tries_again(
    server: ConversationsServer, header: str, value: str
) -> None:
    """The service says that it refused it, so sending again can't write twice."""
    session = opened("s-429")
    server.fail(path="/items", times=2, status=429, headers={header: value})
    await session.add_items(said(1))
    assert creates(server) == 3
    assert texts(await session.get_items()) == ["item 1"]


@pytest.mark.django_db
async def test_429_for_too_long(server: ConversationsServer) -> None:
    session = opened("s-429-long")
    await session.add_items(said(1))
    server.fail(method="POST", status=429, headers={"Retry-After": "37"})
    with pytest.raises(StoreBusy, match=r"nothing was written.*in 37 sec") as caught:
        await session.add_items(said(2))
    assert caught.value.retry_after == 37
    server.fail(method="POST", times=3, status=429, headers={"Retry-After": "0"})
    with pytest.raises(StoreBusy):
        await session.add_items(said(2))
    server.fail(method="POST", status=429, code="insufficient_quota")
    with pytest.raises(StoreRefused, match="quota"):
        await session.add_items(said(2))
    assert not server.faults
    assert texts(await session.get_items()) == ["item 1"]


@pytest.mark.django_db
@pytest.mark.parametrize("status", [400, 409, 423])
async def test_a_locked_conversation_is_tried_again(
    server: ConversationsServer, status: int
) -> None:
    """ "Please retry in a few seconds", says the service, so reads and writes do."""
    session = opened("s-locked")
    await session.add_items(said(1))
    server.locked_status = status
    server.hold(0.6)
    await session.add_items(said(2))
    server.hold(0.6)
    assert texts(await session.get_items()) == ["item 1", "item 2"]
    server.hold(0.6)
    popped: Any = await session.pop_item()
    assert texts([popped]) == ["item 2"]
    server.hold(0.6)
    await session.clear_session()
    assert not server.conversations


@pytest.mark.django_db
async def test_a_conversation_that_is_locked_in_the_middle_of_a_batch(
    server: ConversationsServer,
) -> None:
    session = opened("s-locked-batch")
    await session.add_items(said(0))
    locked = {"status": 400, "code": "conversation_locked"}
    server.fail(method="POST", path="/items", skip=1, times=3, **locked)
    await session.add_items(said(*range(1, 61)))
    assert texts(await session.get_items()) == [f"item {n}" for n in range(61)]
    assert not server.faults


@pytest.mark.django_db
async def test_a_conversation_that_is_locked_for_too_long(
    server: ConversationsServer,
) -> None:
    session = opened("s-locked-long")
    await session.add_items(said(1))
    locked: Any = {"status": 400, "code": "conversation_locked"}
    server.fail(method="POST", **locked, headers={"Retry-After": "11"})
    with pytest.raises(StoreBusy, match=r"at work.*in 11 seconds") as caught:
        await session.add_items(said(2))
    assert caught.value.retry_after == 11
    # In the middle of a batch, what was written is removed again.
    server.fail(method="POST", skip=1, **locked, headers={"Retry-After": "11"})
    with pytest.raises(StoreBusy):
        await session.add_items(said(*range(2, 40)))
    server.hold(60)
    with pytest.raises(StoreBusy, match="nothing was written"):
        await session.add_items(said(2))
    server.locked.clear()
    assert texts(await session.get_items()) == ["item 1"]
    assert not server.faults


@pytest.mark.django_db
@pytest.mark.parametrize("status", [409, 425])
async def test_what_the_service_did_not_begin_is_sent_again(
    server: ConversationsServer, status: int
) -> None:
    session = opened("s-not-begun")
    server.fail(path="/items", times=2, status=status, headers={"Retry-After": "0"})
    await session.add_items(said(1))
    assert creates(server) == 3
    server.fail(method="POST", times=3, status=status, headers={"Retry-After": "0"})
    with pytest.raises(StoreBusy, match="nothing was written"):
        await session.add_items(said(2))
    server.fail(method="POST", status=status, headers={"x-should-retry": "false"})
    with pytest.raises(StoreBusy):
        await session.add_items(said(2))
    assert not server.faults
    assert texts(await session.get_items()) == ["item 1"]


@pytest.mark.django_db
@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 529])
async def test_a_write_that_may_have_been_done_is_sent_once(
    server: ConversationsServer, status: int
) -> None:
    session = opened("s-may-be")
    await session.add_items(said(1))
    server.requests.clear()
    told = {"Retry-After": "0", "x-should-retry": "true"}
    server.fail(method="POST", after=True, status=status, headers=told)
    with pytest.raises(StoreUnavailable, match="may have arrived"):
        await session.add_items(said(2))
    assert creates(server) == 1
    assert texts(await session.get_items()) == ["item 1", "item 2"]


@pytest.mark.django_db
@pytest.mark.parametrize("value", ["nan", "inf", "-3", "soon", "Sun, 99 Nov", ""])
async def test_a_wait_that_can_not_be_read_is_a_short_one(
    server: ConversationsServer, value: str
) -> None:
    session = opened("s-wait")
    server.fail(path="/items", status=429, headers={"Retry-After": value})
    await session.add_items(said(1))
    assert creates(server) == 2


@pytest.mark.django_db
async def test_a_batch_that_breaks_off_is_removed_again(
    server: ConversationsServer,
) -> None:
    session = opened("s-undone")
    await session.add_items(said(0))
    server.fail(method="POST", path="/items", skip=2, status=400)
    with pytest.raises(
        StorageError, match=r"status 400.*nothing was written"
    ) as caught:
        await session.add_items(said(*range(1, 61)))
    assert not isinstance(caught.value, PartlyWritten)
    assert texts(await session.get_items()) == ["item 0"]
    await session.add_items(said(*range(1, 61)))
    assert len(await session.get_items()) == 61


@pytest.mark.django_db
async def test_a_batch_that_may_have_arrived_in_part(
    server: ConversationsServer,
) -> None:
    """The error tells which items are there for certain, and which perhaps."""
    session = opened("s-unsure")
    await session.add_items(said(0))
    server.fail(method="POST", path="/items", skip=2, after=True)
    with pytest.raises(
        PartlyWritten,
        match=r"first 40 items of a batch of 50 were removed.*41 to 50 may have",
    ) as caught:
        await session.add_items(said(*range(1, 51)))
    assert (caught.value.stored, caught.value.unsure) == (0, range(40, 50))
    found = texts(await session.get_items())
    assert found == ["item 0", *(f"item {n}" for n in range(41, 51))]


async def test_what_was_not_sent_is_not_unsure() -> None:
    """Nobody listens any more after the first 20 items."""
    with conversations_server() as server:
        client = AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=1)
        session = OpenAIConversationsSession(client=client)
        last: Any = {"stops": True, "headers": {"Connection": "close"}}
        server.fail(method="POST", path="/items", status=None, seconds=0.3, **last)
        with pytest.raises(PartlyWritten, match="first 20 are stored") as caught:
            await session.add_items(said(*range(50)))
        assert (caught.value.stored, len(caught.value.unsure)) == (20, 0)
        assert [len(items) for items in server.conversations.values()] == [20]
        await client.close()


@pytest.mark.django_db
async def test_a_batch_that_can_not_be_removed_again(
    server: ConversationsServer,
) -> None:
    session = opened("s-stays")
    await session.add_items(said(0))
    server.fail(method="POST", path="/items", skip=1, status=400)
    server.fail(method="DELETE", path="/items/", skip=2, status=500)
    with pytest.raises(PartlyWritten, match="first 18 are stored and could") as caught:
        await session.add_items(said(*range(1, 31)))
    assert (caught.value.stored, len(caught.value.unsure)) == (18, 0)
    assert texts(await session.get_items())[1:] == [f"item {n}" for n in range(1, 19)]


@pytest.mark.django_db
async def test_what_the_service_refuses(server: ConversationsServer) -> None:
    session = opened("s-refused")
    await session.add_items(said(1))
    server.fail(method="POST", status=400, code="invalid_value")
    with pytest.raises(StorageError, match="code invalid_value") as caught:
        await session.add_items([{"role": "user", "content": "a secret"}])
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    server.fail(method="GET", status=None)
    with override_settings(
        AGENT_SESSIONS={
            "default": {
                "BACKEND": OpenAIConversationsBackend,
                "OPTIONS": options(server, api_key="sk-wrong-key"),
            }
        }
    ):
        with pytest.raises(StoreRefused, match="OPENAI_API_KEY") as refused:
            await opened("s-refused").get_items()
        assert "sk-wrong" not in str(refused.value)
        assert "sk-wrong" not in repr(sessions["default"])


@pytest.mark.django_db
async def test_a_place_that_is_popped_during_a_read(
    server: ConversationsServer,
) -> None:
    """The item at which the next page begins goes: the reading begins again."""
    session = opened("s-place")
    await session.add_items(said(*range(150)))
    server.fail(method="GET", skip=1, status=404)
    assert len(await session.get_items()) == 150
    server.fail(method="GET", times=1, status=404)
    with pytest.raises(HistoryGone):
        await session.get_items()


@pytest.mark.django_db
async def test_pop_of_what_another_process_popped(
    server: ConversationsServer,
) -> None:
    session = opened("s-pops")
    await session.add_items(said(1, 2))
    server.fail(method="DELETE", path="/items/", status=404, after=True)
    popped = await session.pop_item()
    assert popped is not None
    assert texts([popped]) == ["item 1"]
    assert await session.pop_item() is None


# -- the directory ---------------------------------------------------------------------


@pytest.mark.django_db
async def test_the_row_counts(server: ConversationsServer) -> None:
    session = opened("s-counts")
    await session.add_items(said(1, 2, 3))
    assert (await arow(session)).item_count == 3
    await session.pop_item()
    assert (await arow(session)).item_count == 2
    sessions.reset()
    await session.get_items()
    session = opened("s-counts")
    await session.get_items()
    await session.add_items(said(4))
    assert (await arow(session)).item_count == 3
    assert await sessions["default"].aclear(session.key) == 3


@pytest.mark.django_db
async def test_a_fenced_run_that_lost_its_lease_writes_nothing(
    server: ConversationsServer,
) -> None:
    session = opened("s-fence")
    await session.add_items(said(1))
    rows = AgentSession.objects.filter(session_id="s-fence")
    await rows.aupdate(fence=7)
    await session.fenced(7).add_items(said(2))
    with pytest.raises(LeaseLost):
        await session.fenced(6).add_items(said(3))
    assert texts(await session.get_items()) == ["item 1", "item 2"]


@pytest.mark.django_db
def test_the_sync_face_in_a_transaction(server: ConversationsServer) -> None:
    """The row that it makes is in the caller's own transaction."""
    session = opened("s-sync")
    with transaction.atomic():
        session.sync.add_items(said(1, 2))
        assert len(session.sync.get_items()) == 2
    assert row(session).remote_id in server.conversations
    assert session.sync.pop_item() is not None
    session.sync.clear()
    assert server.conversations == {}


@pytest.mark.django_db
async def test_page_for_the_admin(server: ConversationsServer) -> None:
    session = opened("s-page")
    await session.add_items(said(*range(30)))
    backend = sessions["default"]
    newest = await backend.apage(session.key, limit=10)
    assert [item.position for item in newest.items] == list(range(21, 31))
    assert (newest.has_earlier, newest.has_later) == (True, False)
    assert newest.items[0].turn == 21
    earlier = await backend.apage(session.key, before=21, limit=10)
    assert [item.position for item in earlier.items] == list(range(11, 21))
    assert (earlier.has_earlier, earlier.has_later) == (True, True)
    later = await backend.apage(session.key, after=28, limit=10)
    assert [item.position for item in later.items] == [29, 30]
    assert (await backend.apage(session.key, before=1)).items == []


@pytest.mark.django_db
async def test_pages_go_on_where_others_ended(server: ConversationsServer) -> None:
    """A walk through a history reads each item about once, not from the start."""
    session = opened("s-walk")
    await session.add_items(said(*range(430)))
    backend = sessions["default"]
    server.requests.clear()
    found, after, more = [], 0, True
    while more:
        page = await backend.apage(session.key, after=after, limit=100)
        assert page.has_earlier is (after > 0)
        found += page.items
        after, more = page.items[-1].position, page.has_later
    assert len(server.requests) == 5
    assert [item.position for item in found] == list(range(1, 431))
    assert [item.turn for item in found] == list(range(1, 431))
    assert texts([item.item for item in found]) == [f"item {n}" for n in range(430)]
    server.requests.clear()
    assert await afind_head(backend, session.key) == 430
    await session.add_items(said(430))
    assert await afind_head(backend, session.key) == 431
    page = await backend.apage(session.key, before=251, limit=30)
    assert [item.position for item in page.items] == list(range(221, 251))
    assert (page.has_earlier, page.has_later) == (True, True)
    assert sum(1 for method, _ in server.requests if method == "GET") == 3


@pytest.mark.django_db
async def test_pages_after_their_places_were_popped(
    server: ConversationsServer,
) -> None:
    session = opened("s-popped-places")
    await session.add_items(said(*range(205)))
    backend = sessions["default"]
    assert (await backend.apage(session.key, limit=2)).items[-1].position == 205
    for _ in range(10):
        await session.pop_item()
    page = await backend.apage(session.key, limit=3)
    assert [item.position for item in page.items] == [193, 194, 195]
    page = await backend.apage(session.key, after=194, limit=3)
    assert [item.position for item in page.items] == [195]
    assert page.has_later is False
    # Fewer are left than lie behind the known place.
    (history,) = server.conversations.values()
    del history[101:]
    page = await backend.apage(session.key, limit=5)
    assert [item.position for item in page.items] == [97, 98, 99, 100, 101]
    server.conversations.clear()
    with pytest.raises(HistoryGone):
        await backend.apage(session.key, limit=5)


@pytest.mark.django_db
async def test_the_server_is_stopped_and_started_again(
    server: ConversationsServer,
) -> None:
    """What was acknowledged is there, the rest was an error, and the process goes on."""
    session = opened("s-restarted")
    acknowledged = []
    for number in range(12):
        if number == 4:
            server.hang_up()
            server.down = True
        if number == 8:
            server.down = False
        try:
            await session.add_items(said(number))
        except StoreUnavailable:
            continue
        acknowledged.append(f"item {number}")
    assert acknowledged == [f"item {n}" for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert texts(await session.get_items()) == acknowledged


@pytest.mark.django_db(transaction=True)
def test_deleting_a_user_deletes_the_conversations(
    server: ConversationsServer,
) -> None:
    user = get_user_model().objects.create_user("leaver")
    session = opened("s-leaver", user=user)
    session.sync.add_items(said(1, 2))
    server.fail(method="DELETE", status=500)
    user.delete()
    assert len(server.conversations) == 1
    assert PendingClear.objects.get().remote_id in server.conversations
    report = pending.retry_pending()
    assert (report.cleared, report.items) == (1, 2)
    assert server.conversations == {}


@pytest.mark.django_db(transaction=True)
def test_a_session_that_was_deleted_while_it_was_known(
    server: ConversationsServer,
) -> None:
    """Its id begins a new one, unless its owner is gone; nothing old comes back."""
    given = options(server)
    setting = {"default": {"BACKEND": OpenAIConversationsBackend, "OPTIONS": given}}
    with override_settings(AGENT_SESSIONS=setting):
        user = get_user_model().objects.create_user("briefly")
        session, owned = opened("s-known"), opened("s-owned", user=user)
        for each in (session, owned):
            each.sync.add_items(said(1))
        row(session).delete()
        session.sync.add_items(said(2))
        assert texts(session.sync.get_items()) == ["item 2"]
        user.delete()
        with pytest.raises(SessionDoesNotExist):
            owned.sync.add_items(said(2))
        assert owned.sync.get_items() == []
    assert len(server.conversations) == 1


@pytest.mark.django_db
async def test_a_foreign_session_keeps_its_id_to_itself(
    server: ConversationsServer,
) -> None:
    create = sync_to_async(get_user_model().objects.create_user)
    alice, bob = await create("alice"), await create("bob")
    await opened("s-alices", user=alice).add_items(said(1))
    bobs: Any = opened("s-alices", user=bob)
    for call in (bobs.conversation_id, bobs._get_session_id, bobs._clear_session_id):
        with pytest.raises(SessionDoesNotExist):
            await call()


# -- runs ------------------------------------------------------------------------------


@pytest.mark.django_db
async def test_a_run_remembers_and_stores_no_ids_of_others(
    server: ConversationsServer,
) -> None:
    session = opened("s-run")
    steps = [[assistant_message("Hello Alice")], [assistant_message("Alice")]]
    model = ScriptedModel(steps)
    agent = Agent(name="a", model=model)
    await Runner.run(agent, "I am Alice", session=session)
    await Runner.run(agent, "Who am I?", session=session)
    (history,) = server.conversations.values()
    assert texts(history) == ["I am Alice", "Hello Alice", "Who am I?", "Alice"]
    assert len(model.calls[1].input) == 3


@pytest.mark.django_db(transaction=True)
async def test_a_run_through_the_websocket(server: ConversationsServer) -> None:
    user = await sync_to_async(make_user)()
    session_id = (await sync_to_async(create_conversation)(user)).session_id
    agent = Agent(name="a", model=ScriptedModel([[assistant_message("Hello there")]]))
    async with Socket(session_id, user, agent) as socket:
        await socket.say("r1", "Hi")
        events = await socket.to_end(within=20)
    assert text_of(events) == "Hello there"
    (history,) = server.conversations.values()
    assert texts(history) == ["Hi", "Hello there"]
    await sync_to_async(sessions.reset)()


# -- configuration ---------------------------------------------------------------------


def findings(**given: Any) -> list[tuple[str, str]]:
    backend = OpenAIConversationsBackend("default", given)
    return [(str(message.id), str(message.msg)) for message in backend.check()]


def test_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [id for id, _ in findings()] == ["agent_sessions.W010"]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert findings() == []
    assert findings(base_url="https://eu.api.openai.com/v1") == []
    ((id, message),) = findings(base_url="http://proxy.example/v1")
    assert id == "agent_sessions.W010"
    assert "not encrypted" in message
    for wrong in (
        {"base_url": "api.openai.com"},
        {"base_url": 7},
        {"timeout": 0},
        {"timeout": "60"},
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_retries": True},
    ):
        with pytest.raises(
            InvalidBackend, match=f"option {next(iter(wrong))} "
        ) as caught:
            findings(**wrong)
        assert caught.value.id == "agent_sessions.E018"
    with pytest.raises(InvalidBackend, match="Did you mean 'api_key'"):
        findings(api_kye=KEY)


@pytest.mark.django_db
async def test_the_environment_of_openais_client_is_obeyed(
    running: ConversationsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.reset()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    setting = {"default": {"BACKEND": OpenAIConversationsBackend}}
    with override_settings(AGENT_SESSIONS=setting):
        await opened("s-environment").add_items(said(1))
    assert running.headers["openai-organization"] == "org-1"
    assert running.headers["openai-project"] == "proj-1"
    assert running.made == 1
    await OpenAIConversationsSession().add_items(said(1))
    assert running.made == 2


@pytest.mark.django_db
async def test_a_proxy_of_the_environment_is_used(
    running: ConversationsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.reset()
    monkeypatch.setenv("HTTP_PROXY", running.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", running.url.removesuffix("/v1"))
    far = options(running, base_url="http://api.openai.invalid/v1")
    setting = {"default": {"BACKEND": OpenAIConversationsBackend, "OPTIONS": far}}
    with override_settings(AGENT_SESSIONS=setting):
        await opened("s-proxy").add_items(said(1))
    assert running.headers["host"] == "api.openai.invalid"


@pytest.mark.django_db
async def test_without_a_key() -> None:
    assert "OPENAI_API_KEY" not in os.environ
    setting = {"default": {"BACKEND": OpenAIConversationsBackend}}
    with (
        override_settings(AGENT_SESSIONS=setting),
        pytest.raises(InvalidBackend, match="Set OPENAI_API_KEY"),
    ):
        await opened("s-no-key").add_items(said(1))


# -- standalone ------------------------------------------------------------------------


async def test_standalone(running: ConversationsServer) -> None:
    running.reset()
    async with AsyncOpenAI(api_key=KEY, base_url=running.url) as client:
        conversation = (await client.conversations.create()).id
        session = OpenAIConversationsSession(conversation, client)
        assert isinstance(session, SDKConversationsSession)
        assert session.session_id == conversation
        assert conversation in repr(session)
        assert KEY not in repr(session)
        await session.add_items(said(1, 2))
        assert texts(await session.get_items()) == ["item 1", "item 2"]
        assert texts([await session.pop_item()]) == ["item 2"]
        again = OpenAIConversationsSession(conversation, client)
        assert texts(await again.get_items(limit=1)) == ["item 1"]
        await session.clear()
        assert running.conversations == {}
        with pytest.raises(ValueError, match="not made yet"):
            _ = session.session_id
        await session.add_items(said(3))
        assert list(running.conversations) == [session.session_id]
        await session.close()
        # It was given, so it is still open.
        assert not client.is_closed()


async def test_standalone_without_a_conversation(
    running: ConversationsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.reset()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    session = OpenAIConversationsSession()
    assert repr(session) == "<OpenAIConversationsSession 'not made yet'>"
    assert await session.get_items() == []
    assert running.made == 0
    await session.add_items(said(1))
    assert await session.conversation_id() == session.session_id
    other = OpenAIConversationsSession(session_settings={"limit": 1})
    other.session_id = session.session_id
    assert texts(await other.get_items()) == ["item 1"]
    await other.close()
    await session.close()
    assert texts(await session.get_items()) == ["item 1"]


def test_standalone_in_several_loops(running: ConversationsServer) -> None:
    """A given client belongs to one loop; the others have copies of their own."""
    running.reset()
    client = AsyncOpenAI(api_key=KEY, base_url=running.url)
    session = OpenAIConversationsSession(None, client)

    async def first() -> None:
        async with client:
            await session.add_items(said(0))

    asyncio.run(first())
    for number in (1, 2):
        asyncio.run(session.add_items(said(number)))
    assert texts(session.sync.get_items()) == ["item 0", "item 1", "item 2"]
    session.backend.close()
    assert running.made == 1


def test_standalone_without_any_setting(running: ConversationsServer) -> None:
    """No Django settings, no database: as with the SDK's own class."""
    running.reset()
    source = f"""
        import asyncio
        from openai import AsyncOpenAI
        from agent_sessions import OpenAIConversationsSession

        async def main():
            async with AsyncOpenAI(api_key={KEY!r}, base_url={running.url!r}) as client:
                session = OpenAIConversationsSession(client=client)
                await session.add_items([{{"role": "user", "content": "Hi"}}] * 3)
                assert len(await session.get_items(limit=2)) == 2
                page = await session.backend.apage(session.key)
                assert [item.position for item in page.items] == [1, 2, 3]
                await session.pop_item()
                await session.clear_session()

        asyncio.run(main())
    """
    env = {name: v for name, v in os.environ.items() if not name.startswith("DJANGO")}
    subprocess.run([sys.executable, "-c", textwrap.dedent(source)], env=env, check=True)
    assert (running.made, running.conversations) == (1, {})


def test_the_docs_name_the_options_and_the_errors() -> None:
    text = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    assert column(text, "option") == OpenAIConversationsBackend.option_defaults.keys()
    errors = [HistoryGone, StoreRefused, StoreBusy, StoreUnavailable, PartlyWritten]
    assert column(text, "error") == {kind.__name__ for kind in (*errors, StorageError)}
    settings, _, standalone = blocks(text, "python")
    namespace: dict[str, Any] = {}
    exec(settings, namespace)
    with override_settings(AGENT_SESSIONS=namespace["AGENT_SESSIONS"]):
        assert isinstance(sessions["openai"], OpenAIConversationsBackend)
    compile(standalone, "docs/openai.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
