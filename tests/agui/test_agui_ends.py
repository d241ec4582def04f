"""How runs begin and end."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from agents import (
    MaxTurnsExceeded,
    Usage,
)
from agents.exceptions import ModelBehaviorError
from agents.testing import ModelStep, assistant_message, function_call

from agent_sessions.agui import (
    EventMapper,
    messages_from_items,
    run_error,
    snapshot,
    token_usage,
)
from agent_sessions.agui.events import PROTOCOL_VERSION
from tests.support.agui_runs import run, stored
from tests.support.agui_samples import (
    add,
    added,
    agent,
    created,
    delta,
    explode,
    raw,
    reasoning,
)
from tests.support.agui_validator import SequenceChecker, validate_event


async def test_a_failing_tool_closes_everything_before_the_error() -> None:
    mapped = await run(
        agent([function_call("explode", {}, call_id="call_1")], tools=[explode])
    )
    assert mapped.events[-1] == {
        "type": "RUN_ERROR",
        "code": "internal",
        "message": "UserError",
        "metadata": {"runId": "r-1"},
    }
    assert "secret" not in json.dumps(mapped.events)


@pytest.mark.parametrize(
    "events",
    [
        [created(), added(assistant_message("x")), delta("Hel")],
        [created(), added(function_call("add", "{}", call_id="c"))],
        [created(), added(reasoning("x"))],
        [],
    ],
)
async def test_a_model_that_breaks_off_leaves_nothing_open(events: list[Any]) -> None:
    async def broken(call: Any) -> Any:
        for event in events:
            yield event
        raise ModelBehaviorError("broken")

    mapped = await run(agent(ModelStep.stream(broken), tools=[add]))
    assert mapped.kinds[-2:] == ["STEP_FINISHED", "RUN_ERROR"]


async def test_too_many_turns_is_an_error() -> None:
    steps = [
        [function_call("add", {"a": 1, "b": 2}, call_id=f"c{n}")] for n in range(3)
    ]
    mapped = await run(agent(*steps, tools=[add]), max_turns=2)
    assert mapped.events[-1]["message"] == MaxTurnsExceeded.__name__


async def test_a_final_output_made_by_an_error_handler_is_shown() -> None:
    mapped = await run(
        agent([function_call("add", {"a": 1, "b": 2}, call_id="c")], tools=[add]),
        max_turns=1,
        error_handlers={"max_turns": lambda data: "Sorry, too long"},
    )
    assert mapped.text() == "Sorry, too long"
    assert mapped.events[-1]["outcome"] == {"type": "success"}


@pytest.mark.parametrize("mode", ["immediate", "after_turn"])
async def test_a_cancelled_run_is_closed_as_such(mode: Any) -> None:
    def stop(result: Any, event: dict[str, Any]) -> None:
        if event["type"] == "TEXT_MESSAGE_CONTENT":
            result.cancel(mode=mode)

    mapped = await run(
        agent(
            [
                assistant_message("One"),
                function_call("add", {"a": 1, "b": 2}, call_id="c"),
            ],
            [assistant_message("Two")],
            tools=[add],
        ),
        act=stop,
    )
    assert mapped.text() == "One"
    assert mapped.events[-1]["outcome"] == {"type": "cancelled"}


def test_after_the_end_nothing_comes_any_more() -> None:
    for end in (EventMapper.finished, lambda m: m.error("internal", "Failed")):
        mapper = EventMapper(thread_id="t", run_id="r")
        assert end(mapper)
        assert raw(mapper, created(), delta("late")) == []
        assert mapper.finished() == []
        assert mapper.error("internal", "Failed") == []


async def test_usage_is_counted_over_the_run() -> None:
    usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
    usage.output_tokens_details.reasoning_tokens = 2
    usage.input_tokens_details.cached_tokens = 4
    step = ModelStep(output=[assistant_message("Hi")], usage=usage)
    mapped = await run(agent(step))
    assert mapped.events[-1]["usage"] == [
        {
            "inputTokens": 10,
            "outputTokens": 5,
            "totalTokens": 15,
            "reasoningTokens": 2,
            "cachedInputTokens": 4,
        }
    ]


def test_no_usage_is_left_out() -> None:
    assert token_usage(None) == token_usage(Usage()) == []
    mapper = EventMapper(thread_id="t", run_id="r")
    assert "usage" not in mapper.error("model_error", "Failed", Usage())[-1]


def test_a_refusal_of_a_frame_stands_alone() -> None:
    checker = SequenceChecker()
    checker.feed(run_error("session_busy", "Busy", run_id="r-2"))
    checker.feed(run_error("bad_request", "No"))
    assert "metadata" not in checker.events[-1]


def test_the_protocol_version_is_the_package_s() -> None:
    from ag_ui.core import PROTOCOL_VERSION as expected

    assert expected == PROTOCOL_VERSION


def test_importing_the_package_loads_neither_sdk_nor_django() -> None:
    code = (
        "import sys, agent_sessions.agui; print([name for name in "
        "('agents', 'openai', 'ag_ui', 'channels', 'django') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


def test_a_snapshot_without_messages_is_legal() -> None:
    validate_event(snapshot([]))
    assert messages_from_items(stored([None])) == []
