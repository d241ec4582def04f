"""Real runs of the SDK on a scripted model, and the SDK's wrappers of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    OutputGuardrail,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    RunState,
    function_tool,
)
from agents.memory import (
    OpenAIResponsesCompactionSession,
    Session,
    SessionABC,
    SessionSettings,
)
from agents.testing import ModelStep
from openai import AsyncOpenAI

from agent_sessions.testing.base import (
    ContractBase,
    Result,
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


async def _trip(*args: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)


@dataclass(frozen=True)
class Turn:
    """A run: the model's steps, what is stored of them, and the error it ends with."""

    steps: Sequence[Any]
    stored: Sequence[str]
    error: type[Exception] | None = None
    options: Callable[[], dict[str, Any]] = dict


def _handoff() -> dict[str, Any]:
    return {"handoffs": [scripted([say("from the second")], name="second")[0]]}


ADDS = [[call("add", f"c{n}", a=n, b=n)] for n in range(3)]
TURNS = {
    "answer": Turn([say("ok")], ["assistant ok"]),
    "tools": Turn(
        [*ADDS[:2], say("ok")],
        ["call c0", "output c0 0", "call c1", "output c1 2", "assistant ok"],
    ),
    "handoff": Turn(
        [[call("transfer_to_second", "h1")]],
        ["call h1", 'output h1 {"assistant": "second"}', "assistant from the second"],
        options=_handoff,
    ),
    "model_error": Turn(
        [ADDS[0], RuntimeError("down")], ["call c0", "output c0 0"], RuntimeError
    ),
    "max_turns": Turn(
        ADDS,
        ["call c0", "output c0 0", "call c1", "output c1 2", "call c2", "output c2 4"],
        MaxTurnsExceeded,
    ),
    "input_guardrail": Turn(
        [],
        [],
        InputGuardrailTripwireTriggered,
        lambda: {"input_guardrails": [InputGuardrail(_trip, run_in_parallel=False)]},
    ),
    "output_guardrail": Turn(
        [say("bad")],
        [],
        OutputGuardrailTripwireTriggered,
        lambda: {"output_guardrails": [OutputGuardrail(_trip)]},
    ),
}


@contextmanager
def _default_loop() -> Iterator[None]:
    """Set a loop for run_sync, which leaves the thread's default one open on purpose."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class RunCases(ContractBase):
    @each(TURNS)
    async def test_run_is_stored(self, turn: Turn, run: Run) -> None:
        """A run stores its finished steps however it ends; the next run sees them."""
        session = await self.open()
        agent, model = scripted(turn.steps, **{"tools": [add], **turn.options()})
        with pytest.raises(turn.error) if turn.error else nullcontext():
            await run(agent, "hi", session=session, max_turns=3, context=1)
        assert len(model.calls) == len(turn.steps)
        expected = ["user hi", *turn.stored]
        assert outline(await session.get_items()) == expected
        if self.supports_reopen:
            session = await self.open(session.session_id)
        agent, model = scripted([say("next")], tools=[add])
        await run(agent, "go on", session=session)
        assert outline(model.calls[0].input) == [*expected, "user go on"]
        expected += ["user go on", "assistant next"]
        assert outline(await session.get_items()) == expected

    def test_run_sync_is_stored(self) -> None:
        """The same without a loop, twice with one object."""
        session = self.run_coroutine(self.open)
        agent, model = scripted([ADDS[1], say("2"), say("yes")], tools=[add])
        with _default_loop():
            Runner.run_sync(agent, "1 + 1?", session=session)
        expected = ["user 1 + 1?", "call c1", "output c1 2", "assistant 2"]
        assert outline(self.run_coroutine(session.get_items)) == expected
        with _default_loop():
            Runner.run_sync(agent, "sure?", session=session)
        assert outline(model.calls[2].input) == [*expected, "user sure?"]

    async def test_run_stores_question_before_the_model_is_called(
        self, run: Run
    ) -> None:
        """The user's words are safe before any token is spent."""
        session = await self.open()
        seen: list[Any] = []

        async def look(_: Any) -> Any:
            seen.extend(await session.get_items())
            return say("ok")

        parts = [{"type": "input_text", "text": "look"}]
        given = [message("first"), {"role": "user", "content": parts}]
        agent, _ = scripted([ModelStep.respond(look)])
        await run(agent, given, session=session)
        assert_same(seen, given)

    async def test_run_with_limits(self, run: Run) -> None:
        """Limits cut what the model sees, not what is stored; the run's overlay."""
        session = await self.filled(6, session_settings=SessionSettings(limit=2))
        agent, model = scripted([say("ok")] * 2)
        await run(agent, "new", session=session)
        assert texts(model.calls[0].input) == ["item 4", "item 5", "new"]
        assert len(await session.get_items(limit=100)) == 8
        config = RunConfig(session_settings=SessionSettings(limit=4))
        await run(agent, "newer", session=session, run_config=config)
        expected = ["user item 4", "user item 5", "user new", "assistant ok"]
        assert outline(model.calls[1].input) == [*expected, "user newer"]
        assert session.session_settings == SessionSettings(limit=2)

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

    async def test_run_whose_question_is_refused(self, run: Run) -> None:
        """Where the question can't be stored, the model is never called."""
        session = await self.open()
        agent, model = scripted([say("never")])
        bad = {**message("hi"), "score": float("nan")}
        with pytest.raises((ValueError, TypeError)):
            await run(agent, [bad], session=session)
        assert len(model.calls) == 0
        assert await session.get_items() == []

    async def test_run_cancelled_at_once(self) -> None:
        """An immediate cancel while the model thinks leaves the question."""
        session = await self.open()

        async def think(_: Any) -> Any:
            result.cancel("immediate")
            await asyncio.sleep(self.timeout)

        agent, _ = scripted([ModelStep.respond(think)])
        result = Runner.run_streamed(agent, "hi", session=session)
        async for _ in result.stream_events():
            pass
        assert outline(await session.get_items()) == ["user hi"]

    async def test_run_whose_caller_is_gone(self, run: Run) -> None:
        """Where the calling task is cancelled, the question stays and nothing else."""
        session = await self.open()

        async def think(_: Any) -> Any:
            task.cancel()
            await asyncio.sleep(self.timeout)

        agent, _ = scripted([ModelStep.respond(think)])
        task = asyncio.ensure_future(run(agent, "hi", session=session))
        await asyncio.wait({task})
        assert task.cancelled()
        assert outline(await session.get_items()) == ["user hi"]


class FailingSession(SessionABC):
    """A session whose writes can be made to fail, before or after the fact."""

    def __init__(self, inner: Session) -> None:
        self.inner = inner
        self.session_id = inner.session_id
        self.fails = ""

    async def get_items(self, limit: int | None = None) -> list[Any]:
        return await self.inner.get_items(limit)

    async def add_items(self, items: list[Any]) -> None:
        if self.fails == "before":
            raise ConnectionError
        await self.inner.add_items(items)
        if self.fails == "after":
            raise ConnectionError

    async def pop_item(self) -> Any:
        return await self.inner.pop_item()

    async def clear_session(self) -> None:
        await self.inner.clear_session()


ERASE = call("erase", "e1", name="x")


def approvable(
    steps: Sequence[Any], **options: Any
) -> tuple[Agent[Any], Any, list[str]]:
    """Make an agent with a tool that asks; the list has what the tool was run for."""
    ran: list[str] = []

    @function_tool(needs_approval=True)
    def erase(name: str) -> str:
        ran.append(name)
        return f"erased {name}"

    agent, model = scripted([*steps, say("ok")], tools=[erase, add], **options)
    return agent, model, ran


async def decide(
    agent: Agent[Any], paused: Result, *, approve: bool = True
) -> RunState[Any]:
    """Take a paused run's state through its text, as a database would; answer it."""
    assert len(paused.interruptions) == 1
    state = await RunState.from_string(agent, paused.to_state().to_string())
    for interruption in state.get_interruptions():
        (state.approve if approve else state.reject)(interruption)
    return state


class ApprovalCases(ContractBase):
    @each({"granted": True, "denied": False})
    async def test_approval(self, approve: bool, run: Run) -> None:
        """A call that waits is stored without output; the answer stores the output.

        What needs no approval runs at once and only once. The answer may come by way of
        another session object.
        """
        session = await self.open()
        agent, model, ran = approvable([[*ADDS[1], ERASE]])
        paused = await run(agent, "go", session=session)
        pending = ["user go", "call c1", "call e1", "output c1 2"]
        assert outline(await session.get_items()) == pending
        assert ran == []
        state = await decide(agent, paused, approve=approve)
        if self.supports_reopen:
            session = await self.open(session.session_id)
        result = await run(agent, state, session=session)
        assert result.final_output == "ok"
        assert ran == (["x"] if approve else [])
        found = outline(await session.get_items())
        assert outline(model.calls[1].input) == found[:-1]
        output = found.pop(4)
        assert (
            output == "output e1 erased x" if approve else output.startswith("output")
        )
        assert found == [*pending, "assistant ok"]

    @each({"before": "before", "after": "after"})
    async def test_approval_reconciles_a_failed_write(self, fails: str) -> None:
        """A write that failed while resuming is settled, and the tool ran once.

        The SDK finds "exactly before" or "exactly before and the batch" by comparing
        what is stored with what it wrote, so any change to an item, such as 1e22
        become an integer, ends here.
        """
        odd: Any = {**message("odd"), "number": 1e22, "text": "\x00\ud800 世界"}
        session = FailingSession(await self.open())
        agent, _, ran = approvable([[ERASE]])
        paused = await Runner.run(agent, [odd], session=session)
        state = await decide(agent, paused)
        session.fails = fails
        with pytest.raises(ConnectionError):
            await Runner.run(agent, state, session=session)
        assert ran == ["x"]
        session.fails = ""
        kept = await RunState.from_string(agent, state.to_string())
        result = await Runner.run(agent, kept, session=session)
        assert result.final_output == "ok"
        assert ran == ["x"]
        found = outline(await session.get_items())
        assert found[1:] == ["call e1", "output e1 erased x", "assistant ok"]


class WrapperCases(ContractBase):
    @needs("encryption")
    async def test_encrypted_session_wraps_it(self) -> None:
        """The SDK's EncryptedSession reads back what it wrote, and hides it.

        It reads and writes the settings of the session that it wraps.
        """
        from agents.extensions.memory import EncryptedSession

        inner = await self.open(session_settings={"limit": 1})
        session: Any = EncryptedSession(inner.session_id, inner, "a key")
        await session.add_items(messages(3))
        assert texts(await session.get_items()) == ["item 2"]
        session.session_settings = SessionSettings(limit=2)
        assert inner.session_settings == SessionSettings(limit=2)
        assert texts(await session.get_items()) == ["item 1", "item 2"]
        assert_same(await session.get_items(3), messages(3))
        assert "item 1" not in str(await inner.get_items(3))
        assert_same(await session.pop_item(), message("item 2"))
        await session.clear_session()
        assert await inner.get_items() == []

    async def test_compaction_session_wraps_it(self, run: Run) -> None:
        """The SDK's compaction session stores through it, below its threshold."""
        inner = await self.open()
        async with AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9") as client:
            session = OpenAIResponsesCompactionSession(
                inner.session_id, underlying_session=inner, client=client
            )
            agent, model = scripted([say("one"), say("two")])
            await run(agent, "first", session=session)
            await run(agent, "second", session=session)
            assert len(model.calls[1].input) == 3
            assert_same(await session.get_items(), await inner.get_items())
            assert await session.pop_item() is not None
            await session.clear_session()
            assert await inner.get_items() == []
