"""The offline model of the demo, in real runs of the SDK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, ItemHelpers, Runner, RunState, SQLiteSession
from agents.model_settings import ModelSettings
from agents.models.interface import ModelTracing

from example_project import model_choice
from example_project.demo_answers import Question, answer
from example_project.demo_model import DemoModel
from example_project.support import build_support_agent


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent[Any]:
    """Return the demo's agents on a model that doesn't breathe between words."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    support = build_support_agent()
    assert isinstance(support.model, DemoModel)
    support.model.delay = 0
    return support


@pytest.fixture
def session() -> Iterator[SQLiteSession]:
    made = SQLiteSession("demo")
    yield made
    made.close()


def say(*said: str) -> str:
    """Return the answer to the last of several messages, without any tools."""
    items = [{"role": "user", "content": text} for text in said]
    return answer(Question.read(items)).text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["My name is Alice", "What's my name?"], "Alice"),
        (["my name is Alice and my dog is Rex.", "whats my name"], "Alice"),
        (["my name is Alice and my dog is Rex.", "What is my dog?"], "Rex"),
        (["My name is Al", "My name is Bo", "Who am I?"], "Bo"),
        (["Call me Zoë", "What\u2019s my name?"], "Zoë"),
        (["My favorite colour is teal", "What's my favourite colour?"], "teal"),
        (["What's my name?"], "You haven't told me your name"),
        (["Tell me a story", "Hi", "What did I ask first?"], "“Tell me a story”"),
        (["What did I ask first?"], "the first thing you asked"),
        (["Hi there", "What did I just say?"], "“Hi there”"),
        (["a", "b", "How many messages did I send?"], "number 3"),
        (["My name is Alice"], "Nice to meet you, Alice!"),
        (["My name is Alice", "my name is Alice"], "I remember"),
        (
            ["My cat is old and my dog is young"],
            "your cat is old and your dog is young",
        ),
        (["Refund something"], "Which order"),
        (["Where is my order?"], "example 41"),
        (["Qu'est-ce que tu fais?"], "demo model"),
        (["<img src=x onerror=alert(1)>"], "demo model"),
        ([""], "demo model"),
        ([], "demo model"),
    ],
)
def test_it_answers_from_the_history(said: list[str], expected: str) -> None:
    if said and "order" in said[-1]:
        items = [{"role": "user", "content": said[-1]}]
        reply = answer(Question.read(items, tools={"order_status"})).text
    else:
        reply = say(*said)
    assert expected in reply


def test_input_as_text_and_as_parts_is_read_alike() -> None:
    parts = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "My name is Alice"}],
        }
    ]
    assert answer(Question.read(parts)) == answer(Question.read("My name is Alice"))


async def test_a_session_makes_it_remember(
    agent: Agent[Any], session: SQLiteSession
) -> None:
    await Runner.run(agent, "My name is Alice", session=session)
    result = await Runner.run(agent, "What's my name?", session=session)
    assert result.final_output == "Your name is **Alice**."


async def test_a_streamed_answer_comes_word_by_word_and_is_the_same(
    agent: Agent[Any], session: SQLiteSession
) -> None:
    whole = (await Runner.run(agent, "Tell me a story")).final_output
    result = Runner.run_streamed(agent, "Tell me a story", session=session)
    words: list[str] = []
    numbers: list[int] = []
    async for event in result.stream_events():
        if event.type == "raw_response_event":
            numbers.append(event.data.sequence_number)
            if event.data.type == "response.output_text.delta":
                words.append(event.data.delta)
    assert "".join(words) == whole == result.final_output
    assert len(words) > 150
    assert numbers == list(range(len(numbers)))
    usage = result.context_wrapper.usage
    assert usage.requests == 1
    assert usage.output_tokens > 100
    assert usage.output_tokens_details.reasoning_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_it_calls_a_tool_for_each_city(agent: Agent[Any]) -> None:
    result = await Runner.run(agent, "What's the weather in Lisbon and Oslo today?")
    assert "In Lisbon it's" in result.final_output
    assert "In Oslo it's" in result.final_output


async def test_it_looks_an_order_up(agent: Agent[Any]) -> None:
    result = Runner.run_streamed(agent, "Where is order 41?")
    async for _ in result.stream_events():
        pass
    assert "Order **41**" in result.final_output


@pytest.mark.parametrize("approved", [True, False])
async def test_a_refund_waits_for_approval(
    agent: Agent[Any], session: SQLiteSession, approved: bool
) -> None:
    first = Runner.run_streamed(agent, "Refund order 42", session=session)
    async for _ in first.stream_events():
        pass
    [interruption] = first.interruptions
    state = await RunState.from_string(agent, first.to_state().to_string())
    [interruption] = state.get_interruptions()
    if approved:
        state.approve(interruption)
    else:
        state.reject(interruption, rejection_message="Too expensive")
    second = Runner.run_streamed(agent, state, session=session)
    async for _ in second.stream_events():
        pass
    if approved:
        assert "Done: I refunded" in second.final_output
    else:
        assert "I didn't refund anything" in second.final_output
        assert "Too expensive" in second.final_output


async def test_it_hands_over_to_billing_and_back(
    agent: Agent[Any], session: SQLiteSession
) -> None:
    result = await Runner.run(agent, "I need my invoices", session=session)
    assert result.last_agent.name == "Billing specialist"
    assert "Your last invoices" in result.final_output
    result = await Runner.run(
        result.last_agent, "And the weather in Rome?", session=session
    )
    assert result.last_agent.name == "Support"
    assert "In Rome it's" in result.final_output


async def test_the_same_answers_without_a_runner() -> None:
    response = await DemoModel().get_response(
        None,
        "Hello",
        ModelSettings(),
        [],
        None,
        [],
        ModelTracing.DISABLED,
        previous_response_id=None,
        conversation_id=None,
        prompt=None,
    )
    [message] = response.output
    assert ItemHelpers.extract_last_text(message) == "Hello! Ask me what I can do."


@pytest.mark.parametrize(
    ("environment", "label", "kind"),
    [
        ({}, "Demo model (offline)", "DemoModel"),
        (
            {"OPENAI_API_KEY": "k"},
            "the default model at OpenAI",
            "OpenAIResponsesModel",
        ),
        (
            {
                "OPENAI_API_KEY": "k",
                "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
                "OPENAI_MODEL": "small",
            },
            "small at 127.0.0.1",
            "OpenAIChatCompletionsModel",
        ),
    ],
)
def test_the_environment_chooses_the_model(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], label: str, kind: str
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model_choice.label() == label
    assert type(model_choice.build()).__name__ == kind
