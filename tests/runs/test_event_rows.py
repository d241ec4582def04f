"""What runs have told, as rows: whole, sealed, and gone when its time is over."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache

from agent_sessions.models import RunEvents
from agent_sessions.runs import Conversation, event_rows
from tests.support.chat import Socket
from tests.websocket.test_consumer import conversation, speaker

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
