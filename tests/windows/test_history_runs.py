"""Real runs through windows: what the model saw, and what was stored."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest
from agents import Agent, RunConfig, RunState, function_tool
from agents.memory import SessionSettings

from agent_sessions import DjangoSession
from agent_sessions.testing.base import RUNS, Run, call, outline, say, scripted
from agent_sessions.windows import (
    MARKER,
    chain,
    drop_old_tool_outputs,
    keep_system_prefix,
    last_turns,
    token_budget,
    whole_turns,
)
from tests.support.histories import Item, calls, gives, says, system, thinks, user

pytestmark = [pytest.mark.one_database, pytest.mark.django_db]
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)

WEATHER = "sunny, 21 degrees, a light wind from the west"


@function_tool
def weather(city: str) -> str:
    """Tell the weather."""
    return WEATHER


def looking(turns: int) -> tuple[Agent[Any], Any]:
    """Make an agent that looks for the weather in two places in every turn."""
    steps: list[Any] = []
    for turn in range(turns):
        steps += [
            [call("weather", f"{turn}{side}", city="Ulm") for side in "ab"],
            say(f"fine {turn}"),
        ]
    return scripted(steps, tools=[weather])


def turn_of(turn: int, text: str = WEATHER) -> list[str]:
    """Return the outline of one such turn."""
    return [
        f"user q{turn}",
        f"call {turn}a",
        f"call {turn}b",
        f"output {turn}a {text}",
        f"output {turn}b {text}",
        f"assistant fine {turn}",
    ]


async def ask(
    run: Run, agent: Agent[Any], session: DjangoSession, turns: int, window: Any
) -> None:
    config = RunConfig(session_input_callback=window)
    for turn in range(turns):
        await run(agent, f"q{turn}", session=session, run_config=config)


def all_turns(turns: int) -> list[str]:
    return [line for turn in range(turns) for line in turn_of(turn)]


@each_run
async def test_the_model_sees_the_window_and_the_store_has_all(run: Run) -> None:
    session = DjangoSession("s")
    agent, model = looking(4)
    await ask(run, agent, session, 4, last_turns(2))
    seen = outline(model.calls[6].input)
    assert seen == [*turn_of(1), *turn_of(2), "user q3"]
    # Within a run the SDK doesn't ask again: the calls of this turn are there.
    assert outline(model.calls[7].input) == [*seen, *turn_of(3)[1:5]]
    assert outline(await session.get_items()) == all_turns(4)


@each_run
async def test_a_shortened_output_is_stored_whole_and_once(run: Run) -> None:
    session = DjangoSession("s")
    agent, model = looking(4)
    await ask(run, agent, session, 4, drop_old_tool_outputs(1))
    assert outline(model.calls[6].input) == [
        *turn_of(0, MARKER),
        *turn_of(1, MARKER),
        *turn_of(2),
        "user q3",
    ]
    assert outline(await session.get_items()) == all_turns(4)


@each_run
async def test_the_sdk_stores_a_changed_copy_anew(run: Run) -> None:
    """Why outputs are shortened in place: hold it against the next release."""

    def copying(history: list[Any], new: list[Any]) -> list[Any]:
        return [
            *(item | {"output": ""} if "output" in item else item for item in history),
            *new,
        ]

    session = DjangoSession("s")
    agent, _ = looking(2)
    await ask(run, agent, session, 2, copying)
    stored = outline(await session.get_items())
    doubled = [line for line in stored if line == "output 0a "]
    assert (len(doubled), len(stored)) == (1, 14)


@each_run
async def test_a_budget_in_a_run(run: Run) -> None:
    session = DjangoSession("s")
    agent, model = looking(4)
    window = token_budget(13, counter=lambda item: 1)
    await ask(run, agent, session, 4, window)
    seen = outline(model.calls[6].input)
    assert seen == [*turn_of(1), *turn_of(2), "user q3"]
    assert outline(await session.get_items()) == all_turns(4)


@each_run
async def test_the_prefix_and_several_windows_in_a_run(run: Run) -> None:
    """With a callback of one's own, whose addition is stored with each run."""

    days = count()

    async def today(history: list[Any], new: list[Any]) -> list[Any]:
        return [*history, system(f"day {next(days)}", "developer"), *new]

    session = DjangoSession("s")
    await session.add_items([system("Alice is 12")])  # type: ignore[list-item]
    window = chain(
        keep_system_prefix(drop_old_tool_outputs(1), last_turns(2)),
        today,
    )
    agent, model = looking(4)
    await ask(run, agent, session, 4, window)
    # A day stands before the user's message, so it is of the turn before; the first
    # one is of the prefix.
    assert outline(model.calls[6].input) == [
        "system Alice is 12",
        "developer day 0",
        *turn_of(1, MARKER),
        "developer day 2",
        *turn_of(2),
        "developer day 3",
        "user q3",
    ]
    stored = outline(await session.get_items())
    assert [line for line in stored if " day " not in line][1:] == all_turns(4)
    assert [i for i, line in enumerate(stored) if " day " in line] == [1, 8, 15, 22]


@each_run
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7, 8, 12, 99])
async def test_a_limit_and_a_window_never_send_half_a_pair(
    run: Run, limit: int
) -> None:
    """#4322: the SDK itself prunes outputs only where there is no callback."""
    session = DjangoSession("s", session_settings=SessionSettings(limit=limit))
    agent, model = looking(4)
    await ask(run, agent, session, 4, chain(whole_turns(), last_turns(1)))
    newest = turn_of(2) if limit >= 6 else []
    assert outline(model.calls[6].input) == [*newest, "user q3"]
    assert outline(await session.get_items(99)) == all_turns(4)


@each_run
async def test_a_limit_alone_with_a_window_drops_the_orphans(run: Run) -> None:
    """Of a turn that the limit cut, only what can be sent is."""
    session = DjangoSession("s")
    agent, model = looking(2)
    await ask(run, agent, session, 1, None)

    def everything(history: list[Any], new: list[Any]) -> list[Any]:
        return [*history, *new]

    for callback, seen in (
        (everything, ["output 0a " + WEATHER, "output 0b " + WEATHER]),
        (last_turns(5), []),
    ):
        agent, model = scripted([say("ok")])
        config = RunConfig(
            session_input_callback=callback,
            session_settings=SessionSettings(limit=3),
        )
        await run(agent, "more", session=session, run_config=config)
        sent = outline(model.calls[0].input)
        assert sent == [*seen, "assistant fine 0", "user more"]
        await session.pop_item()
        await session.pop_item()
    assert session.session_settings == SessionSettings()
    assert outline(await session.get_items()) == turn_of(0)


@each_run
async def test_limit_as_the_sdk_defines_it(run: Run) -> None:
    """The newest N items of the store; the run's settings lie over the session's."""
    session = DjangoSession("s", session_settings=SessionSettings(limit=4))
    await session.add_items([user(str(n)) for n in range(6)])  # type: ignore[misc]
    agent, model = scripted([say("a"), say("b"), say("c"), say("d")])

    async def seen(**options: Any) -> list[str]:
        await run(agent, "new", session=session, run_config=RunConfig(**options))
        lines = outline(model.calls[-1].input)
        await session.pop_item()
        await session.pop_item()
        return [line.removeprefix("user ") for line in lines]

    two = SessionSettings(limit=2)
    assert await seen() == ["2", "3", "4", "5", "new"]
    assert await seen(session_settings=two) == ["4", "5", "new"]
    window = last_turns(3)
    assert await seen(session_input_callback=window) == ["3", "4", "5", "new"]
    assert await seen(session_input_callback=window, session_settings=two) == [
        "4",
        "5",
        "new",
    ]
    assert len(await session.get_items(99)) == 6


@each_run
async def test_a_late_approval_keeps_its_call(run: Run) -> None:
    """The user writes on, then approves: the old turn's call comes with its output."""

    @function_tool(needs_approval=True)
    def delete(name: str) -> str:
        """Delete a file."""
        return f"{name} is gone"

    steps = [
        [call("delete", "c1", name="a.txt")],
        say("Hello"),
        say("Deleted"),
        say("Yes"),
    ]
    agent, model = scripted(steps, tools=[delete])
    session = DjangoSession("s")
    config = RunConfig(session_input_callback=last_turns(1))
    waiting = await run(agent, "delete a", session=session, run_config=config)
    await run(agent, "hello?", session=session, run_config=config)
    # Without an output the SDK holds the call back.
    assert outline(model.calls[1].input) == ["user delete a", "user hello?"]

    text = json.dumps(waiting.to_state().to_json())
    state: RunState[Any] = await RunState.from_string(agent, text)
    state.approve(state.get_interruptions()[0])
    await run(agent, state, session=session, run_config=config)
    await run(agent, "is it?", session=session, run_config=config)
    assert outline(model.calls[3].input) == [
        "call c1",
        "user hello?",
        "assistant Hello",
        "output c1 a.txt is gone",
        "assistant Deleted",
        "user is it?",
    ]
    assert outline(await session.get_items()) == [
        "user delete a",
        "call c1",
        "user hello?",
        "assistant Hello",
        "output c1 a.txt is gone",
        "assistant Deleted",
        "user is it?",
        "assistant Yes",
    ]


@each_run
async def test_reasoning_in_a_run(run: Run) -> None:
    """#1709, #1882, #3268: never reasoning without what must follow it."""
    turns: list[Item] = [
        item
        for n in range(3)
        for item in (
            user(f"q{n}"),
            thinks(f"{n}a"),
            calls(f"c{n}"),
            gives(f"c{n}"),
            thinks(f"{n}b"),
            says(f"a{n}"),
        )
    ]
    session = DjangoSession("s", session_settings=SessionSettings(limit=11))
    await session.add_items(turns)  # type: ignore[arg-type]
    agent, model = scripted([say("ok")])
    config = RunConfig(session_input_callback=last_turns(1))
    await run(agent, "new", session=session, run_config=config)
    assert [item.get("id", "-") for item in model.calls[0].input] == [
        "-",
        "rs_2a",
        "-",
        "-",
        "rs_2b",
        "msg_a2",
        "-",
    ]
    assert len(await session.get_items(99)) == len(turns) + 2


@each_run
async def test_a_compaction_in_a_run(run: Run) -> None:
    """The documented pair of windows sends what was compacted, however old it is."""
    summary: Item = {"type": "compaction", "id": "cmp_1", "encrypted_content": "all"}
    session = DjangoSession("s")
    await session.add_items([summary])  # type: ignore[list-item]
    agent, model = scripted([say(f"a{n}") for n in range(3)])
    await ask(run, agent, session, 3, chain(whole_turns(), last_turns(1)))
    assert model.calls[0].input[0] == summary
    sent = model.calls[2].input
    assert sent[0] == summary
    assert outline(sent[1:]) == ["user q1", "assistant a1", "user q2"]


@each_run
async def test_the_same_words_twice_are_stored_twice(run: Run) -> None:
    """New input equal to a message of the history is still new."""
    session = DjangoSession("s")
    agent, model = scripted([say("a"), say("b"), say("c")])
    config = RunConfig(session_input_callback=last_turns(1))
    for _ in range(3):
        await run(agent, "again", session=session, run_config=config)
    assert outline(model.calls[2].input) == ["user again", "assistant b", "user again"]
    stored = outline(await session.get_items())
    assert [line for line in stored if line == "user again"] == ["user again"] * 3


@each_run
async def test_what_a_callback_adds_may_be_taken_for_history(run: Run) -> None:
    """The SDK doesn't store what equals an item of the history that wasn't sent."""

    def with_rule(history: list[Any], new: list[Any]) -> list[Any]:
        return [*history, system("be brief"), *new]

    session = DjangoSession("s")
    agent, _ = scripted([say("a"), say("b"), say("c")])
    config = RunConfig(session_input_callback=chain(last_turns(1), with_rule))
    for text in ("1", "2", "3"):
        await run(agent, text, session=session, run_config=config)
    assert outline(await session.get_items()) == [
        "system be brief",
        "user 1",
        "assistant a",
        "user 2",
        "assistant b",
        "user 3",
        "assistant c",
    ]
