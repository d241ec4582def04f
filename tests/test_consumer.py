"""The websocket: frames in, AG-UI out, refusals and close codes."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async

from agent_sessions.models import AgentRun, AgentSession
from tests.chat import Socket, create_conversation, make_user, text_of

pytestmark = pytest.mark.django_db(transaction=True)


def speaker(*texts: str) -> Agent[Any]:
    return Agent(
        name="speaker",
        model=ScriptedModel([[assistant_message(text)] for text in texts]),
    )


async def conversation() -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    return user, row.session_id


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
