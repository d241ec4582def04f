"""Compaction over a DjangoSession: crash-safe, and the originals stay."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from agents import Agent, Runner
from agents.memory import OpenAIResponsesCompactionSession
from agents.memory import session as sdk_session
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.db import connections
from openai import AsyncOpenAI

from agent_sessions import DjangoSession
from agent_sessions.doctor import examine
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import SessionItem
from tests.memory.test_branches import answer, call, texts, user

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


def from_its_thread(write: Callable[[], None]) -> Callable[[], None]:
    """Write from the compactor's thread, and leave no connection to it."""

    def call() -> None:
        write()
        connections.close_all()

    return call


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


async def test_an_unreadable_row_stays_and_all_before_it() -> None:
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one"), user("second")])
    await session.add_items([answer("two")])
    await SessionItem.objects.filter(position=2).aupdate(data="{")
    snapshot = await session._get_compaction_snapshot(10)
    assert (texts(snapshot.items), snapshot.complete) == (["second", "two"], False)
    assert await snapshot.replace_suffix(1, [SUMMARY])
    assert texts(await session.get_items()) == ["first", "second", "compaction"]


async def test_what_is_written_beside_a_run_survives_an_unreadable_row(
    compactor: Compactor,
) -> None:
    """The SDK replaces the whole history, unchecked, where it is given no snapshot."""
    session = DjangoSession("s")
    await session.add_items([user("first"), answer("one")])
    await SessionItem.objects.filter(position=1).aupdate(data="{")
    compactor.before_answer = from_its_thread(
        lambda: DjangoSession("s").sync.add_items([user("meanwhile")])
    )
    agent = Agent(name="a", model=ScriptedModel([[assistant_message("two")]]))
    async with AsyncOpenAI(base_url=compactor.url, api_key="k") as client:
        wrapped = compacting(
            session, client, should_trigger_compaction=lambda context: True
        )
        await Runner.run(agent, "second", session=wrapped)
    assert len(compactor.requests) == 1
    shown = await session.get_items()
    assert texts(shown)[-1] == "meanwhile"
    assert len(shown) == 4


async def test_a_type_of_its_own_begins_no_turn() -> None:
    session = DjangoSession("s")
    odd = {"type": "odd", "role": "user"}
    await session.add_items([user("first"), odd, answer("one")])  # type: ignore[list-item]
    snapshot = await session._get_compaction_snapshot(2)
    assert await snapshot.replace_suffix(0, [SUMMARY])
    await session.add_items([user("next")])
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2]


# -- undo ------------------------------------------------------------------------------


async def compacted(*summary: Any) -> DjangoSession:
    """Return a session of three turns after their compaction."""
    session = DjangoSession("s")
    for number in ("one", "two", "three"):
        await session.add_items([user(number), answer(number.upper())])
    snapshot = await session._get_compaction_snapshot(10)
    assert await snapshot.replace_suffix(0, list(summary))
    return session


@pytest.mark.parametrize(
    "summary",
    [[SUMMARY], [user("one"), user("two"), user("three"), SUMMARY]],
    ids=["alone", "with what users said"],
)
async def test_undo_takes_back_one_turn_of_what_was_compacted(summary: Any) -> None:
    session = await compacted(*summary)
    assert await session.undo_turn() == 3
    assert texts(await session.get_items()) == ["one", "ONE", "two", "TWO"]
    await session.add_items([user("other"), answer("OTHER")])
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2, 3]
    assert await session.undo_turn() == 3
    assert await session.undo_turn() == 2
    assert texts(await session.get_items()) == ["one", "ONE"]
    assert (await sync_to_async(examine)()).is_clean


async def test_undo_after_a_compaction_takes_newer_turns_first() -> None:
    session = await compacted(SUMMARY)
    await session.add_items([user("four"), answer("FOUR")])
    assert await session.undo_turn() == 1
    assert texts(await session.get_items()) == ["compaction"]
    assert await session.undo_turn() == 3
    assert texts(await session.get_items()) == ["one", "ONE", "two", "TWO"]


async def test_undo_goes_back_through_several_compactions() -> None:
    session = await compacted(SUMMARY)
    snapshot = await session._get_compaction_snapshot(10)
    assert await snapshot.replace_suffix(0, [SUMMARY])
    assert await session.undo_turn() == 3
    assert texts(await session.get_items()) == ["one", "ONE", "two", "TWO"]


async def test_undo_takes_a_models_own_compaction_with_its_turn() -> None:
    session = DjangoSession("s")
    await session.add_items([user("one"), answer("ONE")])
    await session.add_items([user("two")])
    await session.undo_turn()
    await session.add_items([user("other")])
    await session.add_items([SUMMARY, answer("OTHER")])  # type: ignore[list-item]
    assert await session.undo_turn() == 2
    assert texts(await session.get_items()) == ["one", "ONE"]


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
