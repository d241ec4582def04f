"""The SDK's own wrappers around a session."""

from __future__ import annotations

from typing import Any

from agents.memory import OpenAIResponsesCompactionSession, SessionSettings
from openai import AsyncOpenAI

from agent_sessions.testing.contract.base import (
    ContractBase,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)
from agent_sessions.testing.contract.scripts import RUNS, Run, outline, say, scripted

KEY = "a key for the contract suite"


class WrapperCases(ContractBase):
    async def _encrypted(self, **options: Any) -> tuple[Any, Any]:
        from agents.extensions.memory import EncryptedSession

        inner = await self.open(**options)
        return inner, EncryptedSession(inner.session_id, inner, KEY)

    @needs("encryption")
    async def test_encrypted_session_wraps_it(self) -> None:
        """The SDK's EncryptedSession reads back what it wrote, and hides it."""
        inner, session = await self._encrypted()
        await session.add_items(messages(3))
        assert_same(await session.get_items(), messages(3))
        assert texts(await session.get_items(2)) == ["item 1", "item 2"]
        assert "item 1" not in str(await inner.get_items())
        assert_same(await session.pop_item(), message("item 2"))
        await session.clear_session()
        assert await inner.get_items() == []

    @needs("encryption")
    async def test_encrypted_session_uses_the_settings(self) -> None:
        """Settings are read and written through the wrapper."""
        inner, session = await self._encrypted(session_settings={"limit": 1})
        await session.add_items(messages(3))
        assert texts(await session.get_items()) == ["item 2"]
        session.session_settings = SessionSettings(limit=2)
        assert inner.session_settings == SessionSettings(limit=2)
        assert texts(await session.get_items()) == ["item 1", "item 2"]

    @needs("encryption")
    @each(RUNS)
    async def test_encrypted_session_in_a_run(self, run: Run) -> None:
        """A run remembers through the wrapper."""
        _, session = await self._encrypted()
        agent, model = scripted([say("one"), say("two")])
        await run(agent, "first", session=session)
        await run(agent, "second", session=session)
        expected = ["user first", "assistant one", "user second"]
        assert outline(model.calls[1].input) == expected
        assert len(await session.get_items()) == 4

    @each(RUNS)
    async def test_compaction_session_wraps_it(self, run: Run) -> None:
        """The SDK's compaction session stores through it, below its threshold."""
        inner = await self.open()
        client = AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9")
        session = OpenAIResponsesCompactionSession(
            inner.session_id, underlying_session=inner, client=client
        )
        agent, model = scripted([say("one"), say("two")])
        await run(agent, "first", session=session)
        await run(agent, "second", session=session)
        assert len(model.calls[1].input) == 3
        assert_same(await session.get_items(), await inner.get_items())
        popped = await session.pop_item()
        assert popped is not None
        await session.clear_session()
        assert await inner.get_items() == []
        await client.close()
