"""Compaction over an EncryptedSession replaces no more than what it has read."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from openai import AsyncOpenAI

from agent_sessions import EncryptedSession, get_session
from agent_sessions.models import SessionItem
from tests.encryption.test_encryption import NEW, said
from tests.memory.test_branches import answer
from tests.memory.test_compaction import (
    SUMMARY,
    Compactor,
    compacting,
    compactor,
    from_its_thread,
)

__all__ = ["compactor"]

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


async def with_an_expired_turn(monkeypatch: pytest.MonkeyPatch) -> EncryptedSession:
    session = EncryptedSession(get_session("s"), NEW, lifetime=60)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    await session.add_items([said("old"), answer("OLD")])
    monkeypatch.setattr("time.time", lambda: 1100.0)
    return session


async def test_an_expired_turn_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = await with_an_expired_turn(monkeypatch)
    await session.add_items([said("new")])
    snapshot = await session._get_compaction_snapshot(5)
    assert (snapshot.items, snapshot.complete) == ([said("new")], False)
    assert await snapshot.replace_suffix(0, [SUMMARY])
    assert await session.get_items() == [SUMMARY]
    monkeypatch.setattr("time.time", lambda: 1010.0)
    assert await session.get_items() == [said("old"), answer("OLD"), SUMMARY]


async def test_what_is_written_beside_a_run_survives_an_expired_turn(
    compactor: Compactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await with_an_expired_turn(monkeypatch)
    sealed = session._vault().seal
    inner: Any = get_session("s")
    compactor.before_answer = from_its_thread(
        lambda: inner.sync.add_items(sealed([said("meanwhile")]))
    )
    agent = Agent(name="a", model=ScriptedModel([[assistant_message("NEW")]]))
    async with AsyncOpenAI(base_url=compactor.url, api_key="k") as client:
        wrapped = compacting(
            session,  # type: ignore[arg-type]
            client,
            should_trigger_compaction=lambda context: True,
        )
        await Runner.run(agent, "new", session=wrapped)
    assert len(compactor.requests) == 1
    shown: Any = await session.get_items()
    assert shown[0] == said("new")
    assert shown[-1] == said("meanwhile")
    assert await SessionItem.objects.acount() == 5


async def test_a_subclass_that_changes_items_gets_no_hook() -> None:
    class Shouting(EncryptedSession):
        async def add_items(self, items: Any, **kwargs: Any) -> None:
            changed: Any = [said(item["content"].upper()) for item in items]
            await super().add_items(changed, **kwargs)

    session = Shouting(get_session("s"), NEW)
    await session.add_items([said("first")])
    assert await session._get_compaction_snapshot(5) is None
    assert not await session._atomic_replace_items([said("sum")])
    assert await session.get_items() == [said("FIRST")]
