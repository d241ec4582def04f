"""What runs have told, as rows: whole, sealed, and gone when its time is over."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from cryptography.fernet import Fernet
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import get_session
from agent_sessions.backends import run_rows
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentRun, AgentSession, RunEvents
from agent_sessions.retention.removal import finish_removals
from agent_sessions.runs import Conversation, RunLimits, event_rows
from tests.runs.test_run_starts import Trips
from tests.runs.test_run_starts import trips as trips
from tests.support.chat import Socket
from tests.websocket.test_consumer import conversation, speaker

ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


async def test_all_that_a_tab_was_told_is_in_rows() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one two three")) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert await rows_of(session_id, user, "r-1") == events


async def rows_of(session_id: str, user: Any, run_id: str) -> list[Any]:
    """Read a run's events, which are without a hole."""
    found = await Conversation.find(session_id, user=user)
    run = await found.runs().aget(run_id=run_id)
    chunks = await found.backend.threads.run(event_rows.read, found, run.pk)
    frames = [frame for chunk in chunks for frame in chunk.frames]
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    assert await RunEvents.objects.filter(run=run).acount() == len(chunks)
    return [frame.event for frame in frames]


async def test_a_run_of_one_turn_makes_few_trips(trips: Trips) -> None:
    """Beside what it reads and appends."""
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one two three")) as tab:
        await tab.sync()
        await tab.to_end()
        trips.made.clear()
        await tab.say("r-1", "Hi")
        await tab.to_end()
        made = [name for name, _ in trips.made]
    writes = {"begin", "write", "finish", "beat", "ask_to_stop"}
    assert 2 <= len([name for name in made if name in writes]) <= 6


async def test_what_is_told_is_sealed_for_its_run_and_its_numbers() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            await tab.to_end()
    rows = RunEvents.objects.filter(run__run_id="r-1", first=1)
    other = await RunEvents.objects.aget(run__run_id="r-2", first=1)
    assert await rows.aupdate(body=other.body) == 1
    found = await Conversation.find(session_id, user=user)
    run = await found.runs().aget(run_id="r-1")
    chunks = await found.backend.threads.run(event_rows.read, found, run.pk)
    assert all(chunk.first > 1 for chunk in chunks)


async def test_an_encrypted_session_tells_nothing_in_clear(settings: Any) -> None:
    key = Fernet.generate_key().decode()
    settings.AGENT_SESSIONS = {
        "default": {"BACKEND": ENCRYPTED, "OPTIONS": {"backend": "in", "keys": [key]}},
        "in": {"BACKEND": DATABASE_BACKEND},
    }
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("a secret answer")) as tab:
        await tab.say("r-1", "a secret question")
        events = await tab.to_end()
    bodies = [row.body async for row in RunEvents.objects.all()]
    assert bodies
    assert not any("secret" in body or "RUN_STARTED" in body for body in bodies)
    assert await rows_of(session_id, user, "r-1") == events


@pytest.mark.parametrize("act", ["clear", "delete row", "delete user", "old"])
async def test_what_was_told_goes_with_the_history(act: str) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert await RunEvents.objects.aexists()
    if act == "clear":
        await get_session(session_id, user=user).clear_session()
    elif act == "delete row":
        await AgentSession.objects.filter(session_id=session_id).adelete()
    elif act == "delete user":
        await sync_to_async(user.delete)()
    else:
        long_ago = timezone.now() - timedelta(hours=2)
        await RunEvents.objects.aupdate(written_at=long_ago)
        await AgentRun.objects.aupdate(finished_at=long_ago)
        await sync_to_async(finish_removals)()
    assert not await RunEvents._base_manager.aexists()


async def test_what_was_told_goes_when_its_time_is_over() -> None:
    user, session_id = await conversation()
    limits = RunLimits(keep_log=0.05)
    async with Socket(session_id, user, speaker("one"), limits=limits) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        async with asyncio.timeout(20):
            while await RunEvents.objects.aexists():  # noqa: ASYNC110 - another task
                await asyncio.sleep(0.02)


def test_no_other_sessions_events_are_locked_by_a_removal() -> None:
    """As MariaDB does for a subquery: it would wait for what other runs write."""
    rows = []
    for name in ("mine", "other"):
        session = AgentSession.objects.create(session_id=name)
        run = AgentRun.objects.create(session=session, run_id="r-1")
        rows.append(RunEvents.objects.create(run=run, first=1, last=1, body="{}"))
    with CaptureQueriesContext(connection) as queries:
        run_rows.remove_events_of("default", [rows[0].run.session_id])
    assert list(RunEvents.objects.all()) == rows[1:]
    deleting = [each["sql"] for each in queries if each["sql"].startswith("DELETE")]
    assert len(deleting) == 1
    assert "SELECT" not in deleting[0]
