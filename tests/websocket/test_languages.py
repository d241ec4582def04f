"""The language of sentences: each socket's reader decides."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache

from agent_sessions.consumers import AgentConsumer
from agent_sessions.runs.failures import message_for
from tests.runs.test_run_failures import broken
from tests.support.approvals import refund
from tests.support.chat import Socket
from tests.support.usages import agent, call, say
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)

ENGLISH = "Something went wrong. Try again."
ACCEPTS = [(b"accept-language", b"de-AT,de;q=0.9,en;q=0.5")]
COOKIE = [(b"accept-language", b"en"), (b"cookie", b"a=b; django_language=de")]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


@pytest.mark.parametrize("headers", [ACCEPTS, COOKIE])
async def test_two_readers_of_one_run_each_read_their_language(headers: Any) -> None:
    user, session_id = await conversation()
    agent = broken()
    async with (
        Socket(session_id, user, agent, headers=headers) as german,
        Socket(session_id, user, agent) as english,
    ):
        for tab in (german, english):
            await tab.sync()
            await tab.to_end()
        await english.say("r-1", "Hi")
        assert (await english.to_end())[-1]["message"] == ENGLISH
        told = (await german.to_end())[-1]["message"]
    assert told != ENGLISH
    # So does a later one, who reads it of the rows, and a frame that is refused.
    async with Socket(session_id, user, agent, headers=headers) as later:
        await later.sync()
        assert (await later.to_end())[-1]["message"] == told
        await later.send("nonsense")
        refused = (await later.frame())["chunk"]["message"]
    assert refused != message_for("bad_request")


async def test_an_approval_is_asked_in_the_language_of_its_reader() -> None:
    user, session_id = await conversation()
    speaker = agent(call("refund", order="1"), say("ok"), tools=[refund])
    async with (
        Socket(session_id, user, speaker, headers=ACCEPTS) as german,
        Socket(session_id, user, speaker) as english,
    ):
        for tab in (german, english):
            await tab.sync()
            await tab.to_end()
        await english.say("r-1", "Hi")
        ends = [(await tab.to_end())[-1] for tab in (german, english)]
    [theirs], [ours] = (end["outcome"]["interrupts"] for end in ends)
    assert ours.pop("message") == "May refund be called?"
    assert "refund" in theirs["message"]
    assert theirs.pop("message") != "May refund be called?"
    assert ours == theirs


@pytest.mark.parametrize("chosen", [None, "", "tlh", "../de"])
async def test_a_hook_that_chooses_no_language_of_ours_leaves_it(chosen: Any) -> None:
    class Chosen(AgentConsumer):
        def get_language(self) -> Any:
            return chosen

    user, session_id = await conversation()
    tab = Socket(session_id, user, broken(), consumer=Chosen, headers=ACCEPTS)
    async with tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["message"] != ENGLISH


@pytest.mark.parametrize("later", [False, True])
async def test_a_hook_may_choose(later: bool) -> None:
    class Chosen(AgentConsumer):
        def get_language(self) -> Any:
            async def choose() -> str:
                return "de"

            return choose() if later else "de"

    user, session_id = await conversation()
    async with Socket(session_id, user, broken(), consumer=Chosen) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["message"] != ENGLISH
