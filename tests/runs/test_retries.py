"""A message that is sent again: it goes on with its turn, and is stored once."""

from __future__ import annotations

from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunConfig,
    function_tool,
    input_guardrail,
    output_guardrail,
)
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from django.core.cache import cache

from agent_sessions import get_session
from tests.runs.test_runs import approve
from tests.support.approvals import lookup, refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, items_of

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def failing_late(calls: int = 1, answer: str = "done") -> Agent[Any]:
    steps: list[Any] = [
        [function_call("lookup", {"order": str(n)}, call_id=f"call_{n}")]
        for n in range(calls)
    ]
    steps += [ModelStep.raise_error(RuntimeError("away")), [assistant_message(answer)]]
    return Agent(name="a", model=ScriptedModel(steps), tools=[lookup])


@pytest.mark.parametrize("calls", [1, 12])
async def test_a_retry_goes_on_after_finished_tools(calls: int) -> None:
    user, session_id = await conversation()
    agent = failing_late(calls)
    async with Socket(session_id, user, agent, max_turns=50) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Look it up")
            events = await tab.to_end()
        assert text_of(events) == "done"
        await tab.sync()
        (snapshot,) = [
            e for e in await tab.to_end() if e["type"] == "MESSAGES_SNAPSHOT"
        ]
    kinds = [kind for kind, *_ in await items_of(session_id)]
    assert kinds == [
        "message",
        *["function_call", "function_call_output"] * calls,
        "message",
    ]
    assert isinstance(agent.model, ScriptedModel)
    # The model was asked with what the tools had found.
    assert len(agent.model.calls[-1].input) == 1 + 2 * calls
    roles = [message["role"] for message in snapshot["messages"]]
    assert roles.count("user") == 1


async def test_a_tab_that_comes_into_a_retry_sees_its_message_once() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, failing_late()) as tab:
        await tab.say("r-1", "Look it up")
        await tab.to_end()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-2", "Look it up")
        await model.paused.wait()
        async with Socket(session_id, user, agent) as other:
            await other.sync()
            (snapshot,) = [
                event
                for event in await other.until("MESSAGES_SNAPSHOT")
                if event["type"] == "MESSAGES_SNAPSHOT"
            ]
            model.gate.set()
            await other.to_end()
    roles = [message["role"] for message in snapshot["messages"]]
    assert roles == ["user", "assistant", "tool"]


async def test_another_message_is_no_retry() -> None:
    user, session_id = await conversation()
    async with Socket(session_id, user, failing_late()) as tab:
        for run_id, text in (("r-1", "Look it up"), ("r-2", "Something else")):
            await tab.say(run_id, text)
            await tab.to_end()
    texts = [text for kind, role, text in await items_of(session_id) if role == "user"]
    assert texts == ["Look it up", "Something else"]


async def test_the_same_words_after_an_answer_ask_anew() -> None:
    user, session_id = await conversation()
    model = ScriptedModel([[assistant_message("one")], [assistant_message("two")]])
    agent: Agent[Any] = Agent(name="a", model=model)
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Hi")
            await tab.to_end()
    texts = [text for *_, text in await items_of(session_id)]
    assert texts == ["Hi", "one", "Hi", "two"]


async def test_the_same_words_after_a_stopped_answer_ask_anew() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.send({"type": "abort", "runId": "r-1"})
        await tab.to_end()
        model.gate.set()
        await tab.say("r-2", "Hi")
        await tab.to_end()
    items: list[Any] = list(await get_session(session_id, user=user).get_items())
    assert [item["role"] for item in items] == ["user", "assistant"] * 2


async def test_a_retry_that_fails_at_once_forgets_no_message() -> None:
    """It is taken back for the Runner, which then doesn't come to storing it."""
    tries = 0

    @input_guardrail(run_in_parallel=False)
    async def check(*args: Any) -> GuardrailFunctionOutput:
        nonlocal tries
        tries += 1
        if tries == 2:
            raise RuntimeError("away")
        return GuardrailFunctionOutput(None, tripwire_triggered=False)

    away = ModelStep.raise_error(RuntimeError("away"))
    steps: list[Any] = [away, [assistant_message("done")]]
    model = ScriptedModel(steps)
    agent: Agent[Any] = Agent(name="a", model=model, input_guardrails=[check])
    user, session_id = await conversation()
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2", "r-3"):
            assert tries < 2 or [t for *_, t in await items_of(session_id)] == ["Hi"]
            await tab.say(run_id, "Hi")
            await tab.to_end()
    assert [text for *_, text in await items_of(session_id)] == ["Hi", "done"]


async def test_a_retry_takes_no_message_out_of_the_history() -> None:
    """A process that is killed before the model is asked must leave it there."""
    user, session_id = await conversation()
    seen: list[Any] = []

    @input_guardrail(run_in_parallel=False)
    async def look(context: Any, agent: Any, said: Any) -> GuardrailFunctionOutput:
        seen.append(([text for *_, text in await items_of(session_id)], said))
        return GuardrailFunctionOutput(None, tripwire_triggered=False)

    away = ModelStep.raise_error(RuntimeError("away"))
    model = ScriptedModel([away, away, [assistant_message("done")]])
    agent: Agent[Any] = Agent(name="a", model=model, input_guardrails=[look])
    async with Socket(session_id, user, agent) as tab:
        for run_id in ("r-1", "r-2", "r-3"):
            await tab.say(run_id, "Hi")
            await tab.to_end()
    stored, given = zip(*seen, strict=True)
    assert stored == ([], ["Hi"], ["Hi"])
    # Guardrails and the model see the message as if it were new.
    message = {"role": "user", "content": "Hi"}
    assert given == ([message],) * 3
    assert [call.input for call in model.calls] == [[message]] * 3


async def test_a_window_is_given_the_turn_of_a_retry_as_new() -> None:
    """One that leaves the history out must not leave out what is asked."""
    given: list[Any] = []

    def only_new(history: list[Any], new: list[Any]) -> list[Any]:
        given.append((len(history), len(new)))
        return new

    user, session_id = await conversation()
    agent = failing_late()
    config = RunConfig(session_input_callback=only_new)
    async with Socket(session_id, user, agent, run_config=config) as tab:
        for run_id in ("r-1", "r-2"):
            await tab.say(run_id, "Look it up")
            events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "success"}
    assert given == [(0, 1), (0, 3)]
    assert isinstance(agent.model, ScriptedModel)
    assert len(agent.model.calls[-1].input) == 3
    assert len(await items_of(session_id)) == 4


# -- after an approval -------------------------------------------------------------------


def broken_later(*steps: Any, **options: Any) -> Agent[Any]:
    """Make an agent that asks to refund, and goes on as `steps` say."""
    calls = [
        function_call("lookup", {"order": "42"}, call_id="call_0"),
        function_call("refund", {"order": "42"}, call_id="call_1"),
    ]
    model = ScriptedModel([calls, *steps])
    options.setdefault("tools", [lookup, refund])
    return Agent(name="cashier", model=model, **options)


async def fail_after_approval(tab: Socket) -> None:
    refunded.clear()
    await tab.say("r-1", "Refund order 42")
    await tab.to_end()
    await tab.answer("r-2", approve())
    assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"


def assert_sent_whole(agent: Agent[Any]) -> None:
    """Assert that no model was sent a call without its output, or a message twice."""
    assert isinstance(agent.model, ScriptedModel)
    for call in agent.model.calls:
        made = [i["call_id"] for i in call.input if i.get("type") == "function_call"]
        got = [
            i["call_id"] for i in call.input if i.get("type") == "function_call_output"
        ]
        assert sorted(made) == sorted(got)
        assert [i["content"] for i in call.input if i.get("role") == "user"] == [
            "Refund order 42"
        ]


AWAY = ModelStep.raise_error(RuntimeError("away"))


async def test_a_retry_after_an_approval_goes_on_with_what_was_done() -> None:
    user, session_id = await conversation()
    agent = broken_later(AWAY, [assistant_message("done")])
    async with Socket(session_id, user, agent) as tab:
        await fail_after_approval(tab)
        # The same answer again is told what came of it, and done no more.
        await tab.answer("r-2", approve())
        assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        await tab.answer("r-3", approve())
        assert (await tab.frame())["chunk"]["code"] == "unknown_interrupt"
        await tab.say("r-4", "Refund order 42")
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["42"]
    assert_sent_whole(agent)
    assert [kind for kind, *_ in await items_of(session_id)] == [
        "message",
        *["function_call"] * 2,
        *["function_call_output"] * 2,
        "message",
    ]


@pytest.mark.parametrize("answers", ["checked", "plain"])
async def test_a_retry_after_a_tool_that_broke_off_asks_again(answers: str) -> None:
    tries = 0

    @function_tool(needs_approval=True, failure_error_function=None)
    def refund(order: str) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("away")
        return "refunded"

    again = [function_call("refund", {"order": "42"}, call_id="call_2")]
    guards: Any = {"output_guardrails": [pass_all]} if answers == "checked" else {}
    agent = broken_later(
        again, [assistant_message("done")], tools=[lookup, refund], **guards
    )
    user, session_id = await conversation()
    async with Socket(session_id, user, agent) as tab:
        await fail_after_approval(tab)
        await tab.say("r-3", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-4", approve("call_2"))
        assert text_of(await tab.to_end()) == "done"
    assert tries == 2
    assert_sent_whole(agent)
    texts = [text for kind, role, text in await items_of(session_id) if role == "user"]
    assert texts == ["Refund order 42"]


@output_guardrail
async def pass_all(*args: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(None, tripwire_triggered=False)


@pytest.mark.parametrize("status", ["cancelled", "resolved"])
async def test_a_retry_after_a_refusal_that_failed(status: str) -> None:
    user, session_id = await conversation()
    agent = broken_later(AWAY, [assistant_message("done")])
    refunded.clear()
    answer: dict[str, Any] = {"interruptId": "call_1", "status": status}
    if status == "resolved":
        answer["payload"] = {"approved": False}
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund order 42")
        await tab.to_end()
        await tab.answer("r-2", answer)
        assert (await tab.to_end())[-1]["type"] == "RUN_ERROR"
        await tab.say("r-3", "Refund order 42")
        assert text_of(await tab.to_end()) == "done"
    assert refunded == []
    assert_sent_whole(agent)
