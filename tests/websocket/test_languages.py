"""The language of sentences: each socket's reader decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from django.core.cache import cache
from django.utils.translation import override

from agent_sessions.consumers import AgentConsumer
from agent_sessions.runs import RunLimits
from agent_sessions.runs.failures import MESSAGES, message_for, question_for
from tests.runs.test_run_failures import broken
from tests.runs.test_runs import approve
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


async def too_often(tab: Socket) -> None:
    for _ in range(3):
        await tab.send({"type": "abort", "runId": "r-9"})


@pytest.mark.parametrize(
    ("accepts", "language"),
    [
        ("ja", "ja"),
        ("de-CH", "de"),
        # Django knows these, and nobody has translated our sentences.
        ("pt-BR", "en"),
        ("zh-Hant-TW,ja;q=0.1", "en"),
        # Nobody knows this.
        ("tlh,de;q=0.5", "de"),
    ],
)
@pytest.mark.parametrize("way", ["header", "cookie"])
async def test_each_refusal_is_in_the_language_of_its_reader(
    accepts: str, language: str, way: str
) -> None:
    headers = [(b"accept-language", accepts.encode())]
    if way == "cookie" and "," not in accepts:
        headers = [(b"cookie", f"django_language={accepts.lower()}".encode())]
    user, session_id = await conversation()
    speaker = agent(call("refund", order="1"), say("ok"), tools=[refund])
    options: Any = {"headers": headers, "max_frames_per_minute": 2}
    options["limits"] = RunLimits(must_answer=True)
    async with Socket(session_id, user, speaker, **options) as tab:
        await tab.say("r-1", "Hi")
        asked = (await tab.to_end())[-1]["outcome"]["interrupts"][0]["message"]
        told = [await refusal(tab, send) for send in REFUSALS]
        with override(language):
            assert asked == question_for("refund")
            assert told == [[code, message_for(code)] for code in CODES]


CODES = [
    "bad_request",
    "interrupts_pending",
    "unknown_interrupt",
    "message_too_long",
    "rate_limited",
]
REFUSALS: list[Callable[[Socket], Awaitable[None]]] = [
    lambda tab: tab.send({"type": "nonsense"}),
    lambda tab: tab.say("r-2", "Hi"),
    lambda tab: tab.answer("r-3", approve("call_9")),
    lambda tab: tab.say("r-4", "a" * 32_001),
    too_often,
]


async def refusal(tab: Socket, send: Callable[[Socket], Awaitable[None]]) -> list[str]:
    await send(tab)
    while "code" not in (chunk := (await tab.frame())["chunk"]):
        pass
    return [chunk["code"], chunk["message"]]


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


@pytest.mark.parametrize("language", ["de", "ja"])
def test_each_sentence_is_translated(language: str) -> None:
    with override("en"):
        english = list(map(message_for, MESSAGES))
    with override(language):
        theirs = list(map(message_for, MESSAGES))
    assert not set(english) & set(theirs)
