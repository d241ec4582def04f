"""How runs end, and runs that wait for an approval and are resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
    Runner,
    RunState,
    function_tool,
)
from agents.memory import Session, SessionABC
from agents.testing import ModelStep

from agent_sessions.testing.base import (
    RUNS,
    ContractBase,
    Result,
    Run,
    add,
    call,
    each,
    message,
    needs,
    outline,
    say,
    scripted,
)


async def _trip(*args: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)


class EndingCases(ContractBase):
    @each(RUNS)
    async def test_run_after_model_error(self, run: Run) -> None:
        """A model that fails leaves the question, and the finished turns."""
        session = await self.open()
        agent, _ = scripted([RuntimeError("the model is down")])
        with pytest.raises(RuntimeError, match="the model is down"):
            await run(agent, "hi", session=session)
        assert outline(await session.get_items()) == ["user hi"]
        agent, _ = scripted(
            [[call("add", "c1", a=1, b=1)], RuntimeError("down")], tools=[add]
        )
        with pytest.raises(RuntimeError, match="down"):
            await run(agent, "again", session=session)
        expected = ["user hi", "user again", "call c1", "output c1 2"]
        assert outline(await session.get_items()) == expected

    @each(RUNS)
    async def test_run_over_max_turns(self, run: Run) -> None:
        """Running out of turns keeps the finished ones, and the next run goes on."""
        session = await self.open()
        steps = [[call("add", f"c{n}", a=n, b=n)] for n in range(2)]
        agent, model = scripted([*steps, say("done")], tools=[add])
        with pytest.raises(MaxTurnsExceeded):
            await run(agent, "go", session=session, max_turns=2)
        expected = ["user go", "call c0", "output c0 0", "call c1", "output c1 2"]
        assert outline(await session.get_items()) == expected
        await run(agent, "go on", session=session)
        assert outline(model.calls[2].input) == [*expected, "user go on"]

    @each(RUNS)
    async def test_run_stopped_by_input_guardrail(self, run: Run) -> None:
        """A question that a guardrail refuses is stored alone."""
        session = await self.open()
        guardrail = InputGuardrail(_trip, run_in_parallel=False)
        agent, model = scripted([say("never")], input_guardrails=[guardrail])
        with pytest.raises(InputGuardrailTripwireTriggered):
            await run(agent, "bad", session=session)
        assert outline(await session.get_items()) == ["user bad"]
        assert len(model.calls) == 0

    @each(RUNS)
    async def test_run_stopped_by_output_guardrail(self, run: Run) -> None:
        """An answer that a guardrail refuses is not stored; the question is."""
        session = await self.open()
        guardrail = OutputGuardrail(_trip)
        agent, _ = scripted([say("bad")], output_guardrails=[guardrail])
        with pytest.raises(OutputGuardrailTripwireTriggered):
            await run(agent, "hi", session=session)
        assert outline(await session.get_items()) == ["user hi"]

    async def test_run_cancelled_at_once(self) -> None:
        """An immediate cancel while the model thinks leaves the question."""
        session = await self.open()
        thinking = asyncio.Event()

        async def think(_: Any) -> Any:
            thinking.set()
            await asyncio.sleep(self.timeout)

        agent, _ = scripted([ModelStep.respond(think)])
        result = Runner.run_streamed(agent, "hi", session=session)

        async def cancel() -> None:
            await thinking.wait()
            result.cancel("immediate")

        canceller = asyncio.create_task(cancel())
        async for _ in result.stream_events():
            pass
        await canceller
        assert outline(await session.get_items()) == ["user hi"]

    async def test_run_cancelled_after_the_turn(self) -> None:
        """A gentle cancel keeps the turn that it came in, whole."""
        session = await self.open()

        @function_tool
        def stop() -> str:
            result.cancel("after_turn")
            return "stopped"

        steps = [[call("stop", "c1")], [call("stop", "c2")], say("never")]
        agent, model = scripted(steps, tools=[stop])
        result = Runner.run_streamed(agent, "hi", session=session)
        async for _ in result.stream_events():
            pass
        expected = ["user hi", "call c1", "output c1 stopped"]
        assert outline(await session.get_items()) == expected
        assert len(model.calls) == 1

    @each(RUNS)
    async def test_run_whose_caller_is_gone(self, run: Run) -> None:
        """Where the calling task is cancelled, the question stays and nothing else."""
        session = await self.open()
        thinking = asyncio.Event()

        async def think(_: Any) -> Any:
            thinking.set()
            await asyncio.sleep(self.timeout)

        agent, _ = scripted([ModelStep.respond(think)])
        task = asyncio.ensure_future(run(agent, "hi", session=session))
        await thinking.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert outline(await session.get_items()) == ["user hi"]

    @each(RUNS)
    async def test_run_whose_question_is_refused(self, run: Run) -> None:
        """Where the question can't be stored, the model is never called."""
        session = await self.open()
        agent, model = scripted([say("never")])
        bad = {**message("hi"), "score": float("nan")}
        with pytest.raises((ValueError, TypeError)):
            await run(agent, [bad], session=session)
        assert len(model.calls) == 0
        assert await session.get_items() == []


class LostConnection(Exception):
    """What the failing session below raises."""


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
            raise LostConnection
        await self.inner.add_items(items)
        if self.fails == "after":
            raise LostConnection

    async def pop_item(self) -> Any:
        return await self.inner.pop_item()

    async def clear_session(self) -> None:
        await self.inner.clear_session()


def approvable(
    steps: Sequence[Any], **options: Any
) -> tuple[Agent[Any], Any, list[str]]:
    """Make an agent with a tool that asks; the list tells what it was run for."""
    ran: list[str] = []

    @function_tool(needs_approval=True)
    def erase(name: str) -> str:
        ran.append(name)
        return f"erased {name}"

    agent, model = scripted(steps, tools=[erase, add], **options)
    return agent, model, ran


async def restore(agent: Agent[Any], result: Result) -> RunState[Any]:
    """Take the state of a paused run through its text, as a database would."""
    assert result.interruptions

    return await RunState.from_string(agent, result.to_state().to_string())


def decide(state: RunState[Any], *, approve: bool = True) -> RunState[Any]:
    for interruption in state.get_interruptions():
        if approve:
            state.approve(interruption)
        else:
            state.reject(interruption)
    return state


class ApprovalCases(ContractBase):
    @each(RUNS)
    async def test_approval_pending(self, run: Run) -> None:
        """While a call waits for approval, it is stored without an output."""
        session = await self.open()
        agent, _, ran = approvable([[call("erase", "e1", name="x")], say("ok")])
        result = await run(agent, "erase x", session=session)
        assert len(result.interruptions) == 1
        assert outline(await session.get_items()) == ["user erase x", "call e1"]
        assert ran == []

    @each(RUNS)
    async def test_approval_granted(self, run: Run) -> None:
        """Resumed from text, the call gets its output and the answer follows."""
        session = await self.open()
        agent, model, ran = approvable([[call("erase", "e1", name="x")], say("ok")])
        paused = await run(agent, "erase x", session=session)
        state = decide(await restore(agent, paused))
        result = await run(agent, state, session=session)
        assert result.final_output == "ok"
        assert ran == ["x"]
        expected = ["user erase x", "call e1", "output e1 erased x", "assistant ok"]
        assert outline(await session.get_items()) == expected
        assert outline(model.calls[1].input) == expected[:-1]

    @each(RUNS)
    async def test_approval_denied(self, run: Run) -> None:
        """A refusal is an output too, and the tool doesn't run."""
        session = await self.open()
        agent, _, ran = approvable([[call("erase", "e1", name="x")], say("ok")])
        paused = await run(agent, "erase x", session=session)
        state = decide(await restore(agent, paused), approve=False)
        await run(agent, state, session=session)
        found = outline(await session.get_items())
        assert ran == []
        assert len(found) == 4
        assert found[2].startswith("output e1 ")
        assert found[3] == "assistant ok"

    @each(RUNS)
    async def test_approval_beside_a_free_tool(self, run: Run) -> None:
        """What needs no approval runs at once and only once."""
        session = await self.open()
        calls = [call("add", "c1", a=1, b=1), call("erase", "e1", name="x")]
        agent, _, ran = approvable([calls, say("ok")])
        paused = await run(agent, "go", session=session)
        pending = ["user go", "call c1", "call e1", "output c1 2"]
        assert outline(await session.get_items()) == pending
        await run(agent, decide(await restore(agent, paused)), session=session)
        expected = [*pending, "output e1 erased x", "assistant ok"]
        assert outline(await session.get_items()) == expected
        assert ran == ["x"]

    @each(RUNS)
    async def test_approval_with_output_guardrail(self, run: Run) -> None:
        """Where the SDK holds a paused turn back, resuming stores it whole."""

        async def pass_all(*args: Any) -> GuardrailFunctionOutput:
            return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

        session = await self.open()
        agent, _, _ = approvable(
            [[call("erase", "e1", name="x")], say("ok")],
            output_guardrails=[OutputGuardrail(pass_all)],
        )
        paused = await run(agent, "erase x", session=session)
        await run(agent, decide(await restore(agent, paused)), session=session)
        expected = ["user erase x", "call e1", "output e1 erased x", "assistant ok"]
        assert outline(await session.get_items()) == expected

    @needs("reopen")
    @each(RUNS)
    async def test_approval_by_another_object(self, run: Run) -> None:
        """The approval may come much later, by way of another session object."""
        session = await self.open()
        agent, _, _ = approvable([[call("erase", "e1", name="x")], say("ok")])
        paused = await run(agent, "erase x", session=session)
        state = decide(await restore(agent, paused))
        again = await self.open(session.session_id)
        await run(agent, state, session=again)
        assert len(await session.get_items()) == 4

    @each({"before": "before", "after": "after"})
    async def test_approval_reconciles_a_failed_write(self, fails: str) -> None:
        """A write that failed while resuming is settled, and the tool ran once.

        The SDK finds "exactly before" or "exactly before and the batch" by comparing
        what is stored with what it wrote, so any change to an item, such as 1e22
        become an integer, ends here.
        """
        odd: Any = {**message("odd"), "number": 1e22, "text": "\x00\ud800 世界"}
        session = FailingSession(await self.open())
        agent, _, ran = approvable([[call("erase", "e1", name="x")], say("ok")])
        paused = await Runner.run(agent, [odd], session=session)
        state = decide(await restore(agent, paused))
        session.fails = fails
        with pytest.raises(LostConnection):
            await Runner.run(agent, state, session=session)
        assert ran == ["x"]
        session.fails = ""
        kept = await RunState.from_string(agent, state.to_string())
        result = await Runner.run(agent, kept, session=session)
        assert result.final_output == "ok"
        assert ran == ["x"]
        found = outline(await session.get_items())
        assert found[1:] == ["call e1", "output e1 erased x", "assistant ok"]
