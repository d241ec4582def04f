"""What of a long history a run reads and sends: the newest turns, unless told else."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent, RunConfig
from agents.testing import ScriptedModel, assistant_message
from django.core.cache import cache

from agent_sessions import DjangoSession
from agent_sessions.runs.setup import WINDOW_ITEMS
from agent_sessions.windows import last_turns
from tests.support.chat import Socket
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def turn(number: int) -> list[Any]:
    return [
        {"role": "user", "content": f"question {number}"},
        {
            "type": "function_call",
            "call_id": f"c{number}",
            "name": "f",
            "arguments": "{}",
        },
        {"type": "function_call_output", "call_id": f"c{number}", "output": "x"},
        {"role": "assistant", "content": f"answer {number}"},
    ]


async def asked(turns: int, *, greeting: bool = False, **options: Any) -> list[Any]:
    """Return what a model is sent after so many turns."""
    user, session_id = await conversation()
    session = DjangoSession(session_id, user=user)
    hello: Any = [{"role": "assistant", "content": "How can I help?"}]
    items = [item for number in range(turns) for item in turn(number)]
    await session.add_items([*(hello if greeting else []), *items])
    model = ScriptedModel([[assistant_message("yes")]])
    agent: Agent[Any] = Agent(name="a", model=model)
    async with Socket(session_id, user, agent, **options) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "success"}
    return list(model.calls[0].input)


async def test_a_short_history_is_sent_whole() -> None:
    sent = await asked(10, greeting=True)
    assert len(sent) == 1 + 40 + 1
    assert sent[0]["content"] == "How can I help?"


async def test_the_newest_turns_of_a_long_history_are_sent() -> None:
    sent = await asked(400)
    assert len(sent) == 50 * 4 + 1
    assert sent[0]["content"] == "question 350"


async def test_what_is_read_begins_with_a_users_message() -> None:
    sent = await asked(200, window=last_turns(1_000))
    assert WINDOW_ITEMS - 4 <= len(sent) - 1 <= WINDOW_ITEMS
    assert sent[0]["role"] == "user"


async def test_without_a_window_all_is_sent() -> None:
    assert len(await asked(200, window=None)) == 801


@pytest.mark.parametrize("as_dict", [True, False])
async def test_a_callback_of_the_app_comes_first(as_dict: bool) -> None:
    options: Any = {"session_input_callback": last_turns(2)}
    config: Any = options if as_dict else RunConfig(**options)
    assert len(await asked(200, run_config=config)) == 9


async def test_a_limit_of_the_app_stays() -> None:
    config: Any = {"session_settings": {"limit": 10}}
    sent = await asked(20, run_config=config)
    assert len(sent) == 9
    assert sent[0]["content"] == "question 18"


async def test_a_turn_longer_than_what_is_read_loses_no_reasoning() -> None:
    user, session_id = await conversation()
    items: list[Any] = [{"role": "user", "content": "question"}]
    for number in range(200):
        thought = {"type": "reasoning", "id": f"rs_{number}", "summary": []}
        items += [thought, *turn(number)[1:3]]
    await DjangoSession(session_id, user=user).add_items(items)
    model = ScriptedModel([[assistant_message("yes")]])
    agent: Agent[Any] = Agent(name="a", model=model)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    kinds = [item.get("type", "message") for item in model.calls[0].input]
    assert len(kinds) > WINDOW_ITEMS - 4
    step = ["reasoning", "function_call", "function_call_output"]
    assert kinds == step * (len(kinds) // 3) + ["message"]
