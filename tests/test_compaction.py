"""Compaction over a DjangoSession: crash-safe, and the originals stay."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from agents import Agent, Runner
from agents.memory import OpenAIResponsesCompactionSession
from agents.memory import session as sdk_session
from agents.testing import ScriptedModel, assistant_message
from openai import AsyncOpenAI

from agent_sessions import DjangoSession
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import SessionItem
from tests.test_branches import answer, call, texts, user

pytestmark = pytest.mark.django_db(transaction=True)

SUMMARY = {"type": "compaction", "id": "cmp_1", "encrypted_content": "summary"}


class Compactor:
    """An HTTP server that answers POST /responses/compact as the API documents it."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.before_answer: Any = None
        compactor = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                compactor.requests.append((self.path, json.loads(body)))
                if compactor.before_answer is not None:
                    compactor.before_answer()
                answer = {
                    "id": "resp_c",
                    "object": "response.compaction",
                    "created_at": 1,
                    "output": [SUMMARY],
                    "usage": {
                        "input_tokens": 5,
                        "input_tokens_details": {
                            "cached_tokens": 0,
                            "cache_write_tokens": 0,
                        },
                        "output_tokens": 1,
                        "output_tokens_details": {"reasoning_tokens": 0},
                        "total_tokens": 6,
                    },
                }
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the tests' output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def compactor() -> Iterator[Compactor]:
    made = Compactor()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def compacting(session: DjangoSession, client: AsyncOpenAI, **options: Any) -> Any:
    return OpenAIResponsesCompactionSession(
        session_id=session.session_id,
        underlying_session=session,
        client=client,
        model="gpt-5-mini",
        compaction_mode="input",
        **options,
    )


async def test_the_hooks_are_those_of_this_release() -> None:
    """Their names are private to the SDK: this fails when a release moves them."""
    assert hasattr(sdk_session, "_CompactionSnapshot")
    source = OpenAIResponsesCompactionSession.run_compaction.__module__
    text = open_source(source)
    assert "_get_compaction_snapshot" in text
    assert "_atomic_replace_items" in text


def open_source(module: str) -> str:
    import importlib
    from pathlib import Path

    return Path(str(importlib.import_module(module).__file__)).read_text()


async def test_a_run_compacts_and_the_originals_can_be_brought_back(
    compactor: Compactor,
) -> None:
    """openai-agents-python 5010, 3116: compaction lost what a failure came upon."""
    session = DjangoSession("s")
    model = ScriptedModel([[assistant_message("one")], [assistant_message("two")]])
    agent = Agent(name="a", model=model)
    async with AsyncOpenAI(base_url=compactor.url, api_key="k") as client:
        wrapped = compacting(
            session, client, should_trigger_compaction=lambda context: True
        )
        await Runner.run(agent, "first", session=wrapped)
        assert await session.get_items() == [SUMMARY]
        await Runner.run(agent, "second", session=wrapped)
    assert [path for path, _ in compactor.requests] == ["/v1/responses/compact"] * 2
    generations = await session.list_archived()
    assert len(generations) == 2
    await session.restore_branch(generations[0])
    assert texts(await session.get_items()) == ["first", [*answer_parts("one")]]


def answer_parts(text: str) -> list[Any]:
    return [{"annotations": [], "text": text, "type": "output_text", "logprobs": []}]


async def test_a_tail_that_has_moved_is_left_alone(compactor: Compactor) -> None:
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one")])
    snapshot = await session._get_compaction_snapshot(10)
    assert snapshot.complete
    await session.add_items([user("meanwhile")])
    assert await snapshot.replace_suffix(0, [SUMMARY]) is False
    assert texts(await session.get_items()) == ["first", "one", "meanwhile"]


async def test_only_the_tail_is_replaced() -> None:
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one")])
    await session.add_items([user("second"), *call("lookup"), answer("two")])
    snapshot = await session._get_compaction_snapshot(4)
    assert not snapshot.complete
    assert texts(snapshot.items)[0] == "second"
    assert await snapshot.replace_suffix(1, [SUMMARY, user("kept")]) is True
    assert texts(await session.get_items()) == [
        "first",
        "one",
        "second",
        "compaction",
        "kept",
    ]
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2, 3]
    await session.add_items([user("next")])
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2, 3, 4]


async def test_nothing_is_done_over_an_unreadable_row() -> None:
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one")])
    await SessionItem.objects.filter(position=1).aupdate(data="{")
    assert await session._get_compaction_snapshot(10) is None
    assert await session._get_compaction_snapshot(1) is not None


async def test_the_whole_history_is_replaced_in_one_step() -> None:
    session = DjangoSession("s")
    assert await session._atomic_replace_items([SUMMARY]) is False  # type: ignore[list-item]
    await session.add_items([user("first"), answer("one")])
    assert await session._atomic_replace_items([SUMMARY]) is True  # type: ignore[list-item]
    assert await session.get_items() == [SUMMARY]
    assert await SessionItem.objects.acount() == 3


async def test_a_subclass_that_changes_items_gets_no_hook() -> None:
    class Shouting(DjangoSession):
        async def add_items(self, items: Any, **kwargs: Any) -> None:
            changed = [{**item, "content": item["content"].upper()} for item in items]
            added: Any = changed
            await super().add_items(added, **kwargs)

    session = Shouting("s")
    await session.add_items([user("first")])
    assert await session._get_compaction_snapshot(10) is None
    assert await session._atomic_replace_items([SUMMARY]) is False  # type: ignore[list-item]


async def test_without_the_hooks_the_session_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(sdk_session, "_CompactionSnapshot")
    session = DjangoSession("s")
    await session.add_items([user("first")])
    assert await session._get_compaction_snapshot(10) is None
    assert texts(await session.get_items()) == ["first"]


async def test_a_run_that_lost_its_lease_compacts_nothing() -> None:
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one")])
    late = session.fenced(5)
    snapshot = await late._get_compaction_snapshot(10)
    with pytest.raises(LeaseLost):
        await snapshot.replace_suffix(0, [SUMMARY])
    for change in (late.pop_item(), late.clear_session()):
        with pytest.raises(LeaseLost):
            await change
    assert len(await session.get_items()) == 2
