"""Pages and snapshots: each output has its call on the same page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.core.cache import cache
from django.test import AsyncClient
from django.urls import reverse

from agent_sessions import DjangoSession
from agent_sessions.agui import StreamOptions
from agent_sessions.runs.pages import SNAPSHOT_BYTES
from tests.support.chat import Socket
from tests.websocket.test_consumer import conversation, speaker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def turn(number: int, calls: int, *, parallel: bool) -> list[Any]:
    made = [
        {
            "type": "function_call",
            "call_id": f"c-{number}-{n}",
            "name": "f",
            "arguments": "{}",
        }
        for n in range(calls)
    ]
    outputs = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "x"}
        for call in made
    ]
    pairs = zip(made, outputs, strict=True)
    middle = (
        [*made, *outputs] if parallel else [each for pair in pairs for each in pair]
    )
    return [
        {"role": "user", "content": f"question {number}"},
        *middle,
        {"role": "assistant", "content": f"answer {number}"},
    ]


def assert_whole(messages: list[Any]) -> None:
    called: set[str] = set()
    answered: set[str] = set()
    for message in messages:
        called |= {call["id"] for call in message.get("toolCalls", ())}
        if message["role"] == "tool":
            assert message["toolCallId"] in called
            answered.add(message["toolCallId"])
    assert called == answered


@pytest.mark.parametrize(
    ("turns", "calls", "parallel"),
    [(8, 6, False), (9, 6, False), (20, 3, True), (2, 120, True), (1, 300, True)],
)
async def test_no_page_is_cut_between_a_call_and_its_output(
    turns: int, calls: int, parallel: bool
) -> None:
    pages = await pages_of(
        [turn(number, calls, parallel=parallel) for number in range(turns)]
    )
    for page in pages:
        assert page
        assert_whole(page)
    ids = [message["id"] for page in pages for message in page]
    assert len(ids) == len(set(ids)) == turns * (2 * calls + 2)


async def pages_of(turns: list[Any]) -> list[Any]:
    """Return what a page is shown of a history, a snapshot and pages before it."""
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    for items in turns:
        await session.add_items(items)
    async with Socket(session_id, user, speaker()) as tab:
        await tab.sync()
        _, snapshot, _ = await tab.to_end()
    pages = [snapshot["messages"]]
    before = snapshot.get("metadata", {}).get("before")
    client = AsyncClient()
    await client.aforce_login(user)
    url = reverse("agent_sessions:messages", args=[session_id])
    while before is not None:
        answer = (await client.get(url, {"before": before})).json()
        pages.insert(0, answer["messages"])
        before = answer["before"]
    return pages


@pytest.mark.parametrize("arguments", ["{}", json.dumps({"a": "y" * 15_000})])
async def test_calls_at_once_stay_whole_though_their_outputs_are_too_long(
    arguments: str,
) -> None:
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    items = turn(1, 120, parallel=True)[:-1]
    for item in items[1:]:
        item |= {"arguments": arguments} if "name" in item else {"output": "x" * 15_000}
    await session.add_items([*turn(0, 1, parallel=False), *items])
    options = StreamOptions(expose_tools="full")
    async with Socket(session_id, user, speaker(), stream_options=options) as tab:
        await tab.sync()
        _, snapshot, _ = await tab.to_end()
    messages = snapshot["messages"]
    assert_whole(messages)
    assert len(messages) >= 240
    assert len(json.dumps(messages)) <= SNAPSHOT_BYTES + 3 * 240
    # The newest are there, and of the others a page says that they were cut.
    assert messages[-1]["content"] == "x" * 15_000
    cut = [each for each in messages if each["role"] == "tool" and not each["content"]]
    assert cut
    assert all(each["metadata"] == {"truncated": True} for each in cut)


def found(number: int) -> list[Any]:
    """Return a turn in which the provider looks for tools; its search has no call id."""
    question, *rest = turn(number, 4, parallel=False)
    search = {"call_id": None, "execution": "server"}
    return [
        question,
        {"type": "tool_search_call", "id": f"tsc-{number}", "arguments": {}, **search},
        {"type": "tool_search_output", "id": f"tso-{number}", "tools": [], **search},
        *rest,
    ]


def named_by_id(number: int) -> list[Any]:
    """Return a turn with outputs of the API's own shell, which have the call's id."""
    question, *_, answer = turn(number, 0, parallel=False)
    calls = [
        {"type": "local_shell_call", "id": f"i-{number}-{n}", "action": {}}
        for n in range(5)
    ]
    return [
        question,
        *[call | {"call_id": f"c-{call['id']}"} for call in calls],
        *[
            {"type": "local_shell_call_output", "id": f"c-{call['id']}", "output": "x"}
            for call in calls
        ],
        answer,
    ]


@pytest.mark.parametrize("kind", [found, named_by_id])
async def test_outputs_without_a_call_id_cut_no_page_short(kind: Any) -> None:
    pages = await pages_of([kind(number) for number in range(40)])
    for page in pages:
        assert_whole(page)
    assert all(len(page) > 60 for page in pages[1:])
