"""Run real agents and map their streams, checking every event on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agents import Agent, RunConfig, Runner
from agents.result import RunResultStreaming

from agent_sessions.agui import (
    EventMapper,
    StreamOptions,
    interrupts,
    messages_from_items,
)
from tests.support.agui_validator import SequenceChecker

FULL = StreamOptions(expose_tools="full", stream_reasoning=True)


@dataclass
class Stored:
    """An item as a session gives it back."""

    position: int
    item: dict[str, Any] | None
    message_id: str = ""
    agent_name: str = ""
    siblings: dict[str, Any] | None = None


@dataclass
class Mapped:
    """A run that has been mapped to its end."""

    events: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    result: RunResultStreaming

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] in kinds]

    def text(self) -> str:
        return "".join(event["delta"] for event in self.of("TEXT_MESSAGE_CONTENT"))

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]


def stored(items: list[Any]) -> list[Stored]:
    return [Stored(position, item) for position, item in enumerate(items)]


async def run(
    agent: Agent[Any],
    input: Any = "Hello",
    options: StreamOptions = FULL,
    *,
    run_id: str = "r-1",
    act: Callable[[RunResultStreaming, dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Mapped:
    """Run an agent; `act` sees each event, and may cancel. Errors become RUN_ERROR."""
    mapper = EventMapper(thread_id="t-1", run_id=run_id, options=options)
    checker = SequenceChecker()
    checker.feed(mapper.started([{"id": "u-1", "role": "user", "content": "Hello"}]))
    config = RunConfig(tracing_disabled=True)
    result = Runner.run_streamed(agent, input, run_config=config, **settings)
    cancelled = False
    try:
        async for event in result.stream_events():
            for made in mapper.map(event):
                checker.feed(made)
                if act is not None and not cancelled:
                    act(result, made)
                    cancelled = result._cancel_mode != "none"
    except Exception as error:
        checker.feed_all(mapper.error("internal", type(error).__name__))
    messages = messages_from_items(stored(result.to_input_list()), options)
    usage = result.context_wrapper.usage
    if result.interruptions:
        asked = interrupts(result.interruptions)
        ends = mapper.interrupted(asked, messages=messages, usage=usage)
    else:
        outcome = "cancelled" if cancelled else "success"
        ends = mapper.finished(usage, outcome=outcome)  # type: ignore[arg-type]
    checker.feed_all(ends)
    checker.finish()
    return Mapped(checker.events, messages, result)
