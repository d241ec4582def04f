"""How runs end, and what each ending leaves in the store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import (
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    OutputGuardrail,
    OutputGuardrailTripwireTriggered,
    Runner,
    function_tool,
)
from agents.testing import ModelStep

from agent_sessions.testing.contract.base import (
    ContractBase,
    each,
    message,
)
from agent_sessions.testing.contract.scripts import (
    RUNS,
    Run,
    add,
    call,
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
