"""Real runs of the SDK on a scripted model, and the SDK's wrappers of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from agents import Agent, ModelSettings, RunConfig, Runner, UserError
from agents.memory import OpenAIResponsesCompactionSession, SessionSettings
from agents.testing import ModelStep
from openai import AsyncOpenAI

from agent_sessions.testing.base import (
    RUNS,
    ContractBase,
    Run,
    add,
    assert_same,
    call,
    each,
    message,
    messages,
    needs,
    outline,
    say,
    scripted,
    texts,
)


@contextmanager
def _default_loop() -> Iterator[None]:
    """Give run_sync a loop: it leaves the thread's default one open on purpose."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class RunCases(ContractBase):
    @each(RUNS)
    async def test_run_stores_question_and_answer(self, run: Run) -> None:
        """A plain turn is two items, and the second turn sees the first."""
        session = await self.open()
        agent, model = scripted([say("Hello Alice"), say("Alice")])
        await run(agent, "My name is Alice", session=session)
        expected = ["user My name is Alice", "assistant Hello Alice"]
        assert outline(await session.get_items()) == expected
        result = await run(agent, "What's my name?", session=session)
        assert result.final_output == "Alice"
        assert outline(model.calls[1].input) == [*expected, "user What's my name?"]
        assert len(await session.get_items()) == 4

    def test_run_sync_stores_question_and_answer(self) -> None:
        """The same without a loop, twice with one object."""
        session = self.run_coroutine(self.open)
        agent, model = scripted([[call("add", "c1", a=1, b=2)], say("3"), say("yes")])
        agent.tools = [add]
        with _default_loop():
            Runner.run_sync(agent, "1 + 2?", session=session)
        expected = ["user 1 + 2?", "call c1", "output c1 3", "assistant 3"]
        assert outline(self.run_coroutine(session.get_items)) == expected
        with _default_loop():
            Runner.run_sync(agent, "sure?", session=session)
        assert outline(model.calls[2].input) == [*expected, "user sure?"]

    @each(RUNS)
    async def test_run_stores_question_before_the_model_is_called(
        self, run: Run
    ) -> None:
        """The user's words are safe before any token is spent."""
        session = await self.open()
        seen: list[list[str]] = []

        async def look(_: Any) -> Any:
            seen.append(outline(await session.get_items()))
            return say("ok")

        agent, _ = scripted([ModelStep.respond(look)])
        await run(agent, "hi", session=session)
        assert seen == [["user hi"]]

    @each(RUNS)
    async def test_run_stores_tools(self, run: Run) -> None:
        """Calls and outputs lie between question and answer, turn by turn."""
        session = await self.open()
        steps = [[call("add", "c1", a=1, b=2)], [call("add", "c2", a=3, b=3)], say("6")]
        agent, model = scripted(steps, tools=[add])
        await run(agent, "1+2+3?", session=session)
        expected = ["call c1", "output c1 3", "call c2", "output c2 6"]
        expected = ["user 1+2+3?", *expected, "assistant 6"]
        assert outline(await session.get_items()) == expected
        assert outline(model.calls[2].input) == expected[:-1]

    @each(RUNS)
    async def test_run_stores_parallel_tools(self, run: Run) -> None:
        """Calls of one model answer stand together, their outputs behind."""
        session = await self.open()
        calls = [call("add", f"c{n}", a=n, b=n) for n in range(3)]
        agent, _ = scripted([calls, say("done")], tools=[add])
        await run(agent, "go", session=session)
        calls_and_outputs = [f"call c{n}" for n in range(3)]
        calls_and_outputs += [f"output c{n} {n + n}" for n in range(3)]
        expected = ["user go", *calls_and_outputs, "assistant done"]
        assert outline(await session.get_items()) == expected

    @each(RUNS)
    async def test_run_stores_handoff(self, run: Run) -> None:
        """A handoff is a call and its output; the second agent sees the history."""
        session = await self.open()
        second, second_model = scripted([say("from the second")], name="second")
        handoff = [call("transfer_to_second", "h1")]
        first, _ = scripted([handoff], name="first", handoffs=[second])
        result = await run(first, "help", session=session)
        assert result.last_agent.name == "second"
        expected = ["user help", "call h1", 'output h1 {"assistant": "second"}']
        assert outline(second_model.calls[0].input) == expected
        found = outline(await session.get_items())
        assert found == [*expected, "assistant from the second"]

    @each(RUNS)
    async def test_run_with_agent_as_tool(self, run: Run) -> None:
        """An agent used as a tool keeps its own conversation out of the session."""
        session = await self.open()
        inner, _ = scripted([say("inner answer")], name="inner")
        tool = inner.as_tool(tool_name="ask", tool_description="Ask the inner agent.")
        agent, _ = scripted([[call("ask", "c1", input="q")], say("ok")], tools=[tool])
        await run(agent, "hi", session=session)
        expected = ["user hi", "call c1", "output c1 inner answer", "assistant ok"]
        assert outline(await session.get_items()) == expected

    @each(RUNS)
    async def test_run_with_limited_session(self, run: Run) -> None:
        """The session's limit cuts what the model sees, not what is stored."""
        session = await self.filled(6, session_settings=SessionSettings(limit=2))
        agent, model = scripted([say("ok")])
        await run(agent, "new", session=session)
        assert texts(model.calls[0].input) == ["item 4", "item 5", "new"]
        assert len(await session.get_items(limit=100)) == 8

    @each(RUNS)
    async def test_run_with_limit_in_its_config(self, run: Run) -> None:
        """The run's session settings overlay the session's."""
        session = await self.filled(6, session_settings=SessionSettings(limit=2))
        agent, model = scripted([say("ok"), say("ok")])
        config = RunConfig(session_settings=SessionSettings(limit=4))
        await run(agent, "new", session=session, run_config=config)
        assert texts(model.calls[0].input)[:-1] == [f"item {n}" for n in range(2, 6)]
        assert session.session_settings == SessionSettings(limit=2)
        config = RunConfig(session_settings=SessionSettings(limit=0))
        await run(agent, "newer", session=session, run_config=config)
        assert texts(model.calls[1].input) == ["newer"]

    @each(RUNS)
    async def test_run_with_limit_between_call_and_output(self, run: Run) -> None:
        """An output whose call the limit cut off stays stored and isn't sent."""
        session = await self.open()
        steps = [[call("add", "c1", a=1, b=1)], say("2"), say("ok")]
        agent, model = scripted(steps, tools=[add])
        await run(agent, "go", session=session)
        config = RunConfig(session_settings=SessionSettings(limit=2))
        await run(agent, "more", session=session, run_config=config)
        assert outline(model.calls[2].input) == ["assistant 2", "user more"]
        assert len(await session.get_items()) == 6

    @each(RUNS)
    async def test_run_with_dangling_call(self, run: Run) -> None:
        """A call without output stays stored and isn't sent to the model."""
        session = await self.open()
        dangling = {
            "type": "function_call",
            "call_id": "c1",
            "name": "add",
            "arguments": "{}",
        }
        await session.add_items([message("before"), dangling])
        agent, model = scripted([say("ok")])
        await run(agent, "after", session=session)
        assert outline(model.calls[0].input) == ["user before", "user after"]
        expected = ["user before", "call c1", "user after", "assistant ok"]
        assert outline(await session.get_items()) == expected

    @each(RUNS)
    async def test_run_with_input_callback(self, run: Run) -> None:
        """A callback may drop history and add items; what it adds is stored."""
        session = await self.filled(4)

        async def combine(history: list[Any], new: list[Any]) -> list[Any]:
            history[-1]["content"] = "changed in a copy"
            return [*history[1:2], message("added"), *new]

        agent, model = scripted([say("ok")])
        config = RunConfig(session_input_callback=combine)
        await run(agent, "new", session=session, run_config=config)
        assert texts(model.calls[0].input) == ["item 1", "added", "new"]
        found = await session.get_items()
        assert_same(found[:4], messages(4))
        assert outline(found[4:]) == ["user added", "user new", "assistant ok"]

    @each(RUNS)
    async def test_run_with_list_input(self, run: Run) -> None:
        """Several input items are stored in their order, with content parts."""
        session = await self.open()
        parts = [{"type": "input_text", "text": "look"}]
        given = [message("first"), {"role": "user", "content": parts}]
        agent, _ = scripted([say("ok")])
        await run(agent, given, session=session)
        assert_same((await session.get_items())[:2], given)

    @each(RUNS)
    async def test_run_after_clear(self, run: Run) -> None:
        """After a clear the model knows nothing of what was before."""
        session = await self.open()
        agent, model = scripted([say("one"), say("two")])
        await run(agent, "secret", session=session)
        await session.clear_session()
        await run(agent, "afresh", session=session)
        assert outline(model.calls[1].input) == ["user afresh"]
        expected = ["user afresh", "assistant two"]
        assert outline(await session.get_items()) == expected

    @each(RUNS)
    async def test_run_after_correction(self, run: Run) -> None:
        """Popping answer and question lets the user ask again."""
        session = await self.open()
        agent, model = scripted([say("4"), say("5")])
        await run(agent, "2+2?", session=session)
        await session.pop_item()
        await session.pop_item()
        await run(agent, "2+3?", session=session)
        assert outline(model.calls[1].input) == ["user 2+3?"]

    @each(RUNS)
    async def test_runs_of_several_sessions_at_once(self, run: Run) -> None:
        """Ten conversations at once: each model sees its own history."""
        sessions = [await self.open() for _ in range(10)]

        async def talk(number: int) -> None:
            agent, model = scripted([say(f"a{number}"), say(f"b{number}")])
            await run(agent, f"I am {number}", session=sessions[number])
            await run(agent, "who?", session=sessions[number])
            expected = [f"user I am {number}", f"assistant a{number}", "user who?"]
            assert outline(model.calls[1].input) == expected

        await asyncio.gather(*(talk(number) for number in range(10)))

    @needs("owner")
    @each(RUNS)
    async def test_runs_of_several_users(self, run: Run) -> None:
        """Two users' agents remember their own user; a foreign session stops a run."""
        alice, bob = await self.make_user("alice"), await self.make_user("bob")
        agent, model = scripted([say("hi"), say("ho"), say("never")])
        alices = await self.open(user=alice)
        await run(agent, "I am Alice", session=alices)
        await run(agent, "I am Bob", session=await self.open(user=bob))
        assert outline(model.calls[1].input) == ["user I am Bob"]
        stolen = await self.open(alices.session_id, user=bob)
        with pytest.raises(self.foreign_error):
            await run(agent, "Who am I?", session=stolen)
        assert len(model.calls) == 2
        assert len(await alices.get_items()) == 2

    @needs("reopen")
    @each(RUNS)
    async def test_run_on_a_new_object_each_turn(self, run: Run) -> None:
        """A web view opens the session anew for each turn; memory lasts."""
        session_id = self.new_id()
        agent, model = scripted([say(f"answer {n}") for n in range(3)])
        for number in range(3):
            session = await self.open(session_id)
            await run(agent, f"question {number}", session=session)
        assert len(model.calls[2].input) == 5

    @needs("wrapper")
    @each(RUNS)
    async def test_run_with_context(self, run: Run) -> None:
        """A run's context reaches the session without harm."""
        session = await self.open()
        agent: Agent[Any]
        agent, _ = scripted([say("ok")])
        await run(agent, "hi", session=session, context={"tenant": 1})
        assert outline(await session.get_items()) == ["user hi", "assistant ok"]

    @each(RUNS)
    async def test_run_with_server_side_history_is_refused(self, run: Run) -> None:
        """The SDK takes a session or a conversation id, and then stores nothing."""
        session = await self.open()
        agent, _ = scripted([say("never")], model_settings=ModelSettings())
        with pytest.raises(UserError):
            await run(agent, "hi", session=session, conversation_id="conv_1")
        assert await session.get_items() == []


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
