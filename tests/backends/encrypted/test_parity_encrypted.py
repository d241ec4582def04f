"""EncryptedSession and the SDK's: arguments, budgets, compaction, pops."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Runner
from agents.extensions.memory import EncryptedSession as SDKEncrypted
from agents.memory import (
    OpenAIResponsesCompactionSession,
    SQLiteSession,
)
from agents.testing import ScriptedModel, assistant_message
from openai import AsyncOpenAI

from agent_sessions import (
    EncryptedSession,
    RedisSession,
    get_session,
)
from agent_sessions.exceptions import (
    UnknownEncryptionKey,
)
from tests.memory.test_compaction import SUMMARY, Compactor, compactor
from tests.memory.test_parity import KEY, OTHER, Places, outcome, places, said

__all__ = ["compactor", "places"]

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.one_database,
]


@pytest.mark.parametrize(
    "arguments",
    [
        lambda inner: ((), {"session_id": "s", "underlying_session": inner}),
        lambda inner: (("s", inner), {}),
        lambda inner: (("s",), {"underlying_session": inner, "ttl": 600}),
        lambda inner: (("s", inner), {"max_scan_items": 100, "ttl": 600}),
    ],
    ids=["by name", "by place", "both", "budget"],
)
async def test_encryption_takes_the_arguments_of_the_sdk(arguments: Any) -> None:
    told = []
    for kind in (SDKEncrypted, EncryptedSession):
        inner = SQLiteSession("s")
        given, named = arguments(inner)
        build: Any = kind
        session = build(*given, encryption_key=KEY, **named)
        await session.add_items(said("secret"))
        (stored,) = await inner.get_items()
        told.append(
            (
                session.session_id,
                session.underlying_session is inner,
                session.max_scan_items,
                "secret" in str(stored),
                await session.get_items(),
                session.db_path,
                hasattr(session, "run_compaction"),
                hasattr(session, "nothing_of_the_kind"),
            )
        )
        inner.close()
    assert told[1] == told[0]


def test_five_arguments_go_by_their_places() -> None:
    session = EncryptedSession("s", SQLiteSession("s"), KEY, 60, 7)
    assert (session.session_id, session.ttl, session.max_scan_items) == ("s", 60, 7)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), {}),
        (("s",), {"encryption_key": KEY}),
        (("s", SQLiteSession("s"), KEY, 1, 1, 1), {}),
        ((SQLiteSession("s"), KEY), {"encryption_key": KEY}),
        ((SQLiteSession("s"), KEY), {"underlying_session": SQLiteSession("s")}),
        ((SQLiteSession("s"), KEY), {"ttl": 1, "lifetime": 1}),
        ((SQLiteSession("s"), KEY), {"keys": [KEY]}),
        ((SQLiteSession("s"), KEY), {"tll": 5}),
    ],
)
def test_arguments_that_dont_fit_are_refused(given: Any, named: Any) -> None:
    with pytest.raises(TypeError):
        EncryptedSession(*given, **named)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_positive(budget: int) -> None:
    for kind in (SDKEncrypted, EncryptedSession):
        build: Any = kind
        with pytest.raises(ValueError, match="max_scan_items"):
            build("s", SQLiteSession("s"), KEY, max_scan_items=budget)


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("unreadable", [0, 2])
async def test_a_budget_ends_a_read_as_in_the_sdk(
    tmp_path: Path, limit: int | None, budget: int, unreadable: int
) -> None:
    told = []
    for kind in (SDKEncrypted, EncryptedSession):
        inner = SQLiteSession("s", tmp_path / kind.__module__)
        session: Any = kind("s", inner, KEY, max_scan_items=budget)
        await session.add_items(said(1, 2, 3))
        await inner.add_items(said("not encrypted") * unreadable)
        await session.add_items(said(4))
        told.append(await outcome(session.get_items(limit)))
        inner.close()
    assert told[1] == told[0]


async def test_what_goes_past_the_encryption_is_not_forwarded() -> None:
    session = EncryptedSession(get_session("s"), KEY)
    assert not hasattr(session, "sync")
    assert not hasattr(session, "fenced")
    # Others are.
    assert session.backend is get_session("s").backend
    assert await session.list_branches() == []


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("inner", ["django", "sqlite"])
async def test_compaction_works_over_encryption(
    compactor: Compactor,
    tmp_path: Path,
    automatic: bool,
    inner: str,
) -> None:
    store: Any = get_session("s")
    if inner == "sqlite":
        store = SQLiteSession("s", tmp_path / "s.sqlite3")
    async with AsyncOpenAI(base_url=compactor.url, api_key="k") as client:
        session: Any = OpenAIResponsesCompactionSession(
            "s",
            EncryptedSession(store, KEY),
            client=client,
            model="gpt-5-mini",
            compaction_mode="input",
            should_trigger_compaction=lambda context: automatic,
        )
        agent: Agent[Any] = Agent(
            name="a", model=ScriptedModel([[assistant_message("answer")]])
        )
        await Runner.run(agent, "question", session=session)
        if not automatic:
            assert len(await session.get_items()) == 2
            await session.run_compaction({"force": True})
        (request,) = compactor.requests
        # In the clear: the service can't summarise what it can't read.
        assert "question" in str(request)
        assert "payload" not in str(request)
        assert await session.get_items() == [SUMMARY]
        (stored,) = await store.get_items()
        assert "payload" in stored


async def test_compaction_under_encryption_is_refused() -> None:
    """It would send envelopes to a model."""
    async with AsyncOpenAI(base_url="http://127.0.0.1:1", api_key="k") as client:
        inner = OpenAIResponsesCompactionSession("s", get_session("s"), client=client)
        with pytest.raises(TypeError, match="around EncryptedSession"):
            EncryptedSession(inner, KEY)


@pytest.mark.parametrize("kind", ["database", "redis", "dapr"])
async def test_a_pop_under_a_wrong_key_is_one_step_that_changes_nothing(
    places: Places, kind: str
) -> None:
    store: Any = get_session("s")
    if kind == "redis":
        store = RedisSession.from_url(uuid.uuid4().hex, places.redis_url)
    if kind == "dapr":
        store = places.owned("dapr", True, "s")
    await EncryptedSession(store, KEY).add_items(said(1, 2))
    before = await store.get_items()
    asked: list[str] = []

    class Watched(type(store)):  # type: ignore[misc]
        async def add_items(self, *args: Any, **kwargs: Any) -> None:
            asked.append("add")

    watched = Watched.from_key(store.backend, store.key)
    with pytest.raises(UnknownEncryptionKey):
        await EncryptedSession(watched, OTHER).pop_item()
    assert await store.get_items() == before
    assert await EncryptedSession(watched, KEY).pop_item() == said(2)[0]
    # Nothing was put back.
    assert asked == []


async def test_a_pop_under_one_key_of_many_leaves_the_others_in_order(
    places: Places,
) -> None:
    """Over segments that are sealed: what isn't accepted stays in its place."""
    store: Any = places.owned("dapr", True, "s")
    mine, theirs = EncryptedSession(store, KEY), EncryptedSession(store, OTHER)
    await mine.add_items(said(*range(70)))
    await store.add_items(said("not encrypted") * 40)
    before = await store.get_items()
    assert await mine.pop_item() == said(69)[0]
    assert await store.get_items() == [*before[:69], *before[70:]]
    with pytest.raises(UnknownEncryptionKey):
        await theirs.pop_item()
    assert await store.get_items() == [*before[:69], *before[70:]]
