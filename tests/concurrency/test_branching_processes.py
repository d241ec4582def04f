"""Branches in two processes: what one does the tabs of the other are shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.concurrency.test_processes import another_process
from tests.runs.test_branching import ask, ours, places, said, shown, snapshot_of
from tests.support.chat import Socket, text_of
from tests.websocket.test_consumer import conversation, speaker

pytestmark = pytest.mark.django_db(transaction=True)


def frame(session_id: str, run_id: str, text: str = "", **asked: Any) -> str:
    message = {"id": f"u-{run_id}", "role": "user", "content": text}
    whole = {"threadId": session_id, "runId": run_id, "messages": [message]}
    return f"send {json.dumps({**whole, **ours(**asked)})}"


async def test_a_fork_and_a_switch_of_another_process_are_shown(
    database_environment: dict[str, str],
) -> None:
    """Without a channel layer, so by the rows alone."""
    user, session_id = await conversation()
    async with (
        another_process(database_environment, "", session_id, user) as other,
        Socket(session_id, user, speaker("one", "two")) as tab,
    ):
        await shown(tab)
        await tab.say("r-1", "Hi")
        await tab.to_end()
        edited = {"edit": {"messageId": "u-r-1"}}
        await other.tell(frame(session_id, "r-2", "Hello", **edited))
        theirs = await other.to_end()
        events = await tab.to_end()
        assert events == theirs
        assert said(events) == ["Hello"]
        assert places(events) == [(2, 2)]
        await other.tell(frame(session_id, "s", branch="main"))
        await other.to_end()
        events = await tab.to_end()
        assert said(events) == ["Hi", "one"]
        assert places(events) == [(1, 2)]
        # And the other way round.
        await ask(tab, "t", branch=theirs[1]["metadata"]["branch"])
        assert said(await tab.to_end()) == ["Hello", "done"]
        assert said(await other.to_end()) == ["Hello", "done"]


async def test_a_kill_between_fork_and_run_leaves_a_conversation_that_works(
    database_environment: dict[str, str],
) -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        async with another_process(
            database_environment, "", session_id, user, "dies"
        ) as other:
            edited = {"edit": {"messageId": "u-r-1"}}
            await other.tell(frame(session_id, "r-2", "Hello", **edited))
            await other.process.wait()
        async with Socket(session_id, user, speaker("two")) as next_tab:
            events = await shown(next_tab)
            assert said(events) == []
            left = snapshot_of(events)["metadata"]["siblings"]
            assert left == {"place": 2, "count": 2, "previous": "main"}
            await next_tab.say("r-3", "Hello")
            assert text_of(await next_tab.to_end()) == "two"
            assert places(await shown(next_tab)) == [(2, 2)]
            await ask(next_tab, "s", branch="main")
            assert said(await next_tab.to_end()) == ["Hi", "one"]
