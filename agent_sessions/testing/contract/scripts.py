"""Agents that follow a script, and ways to run them, for the cases with real runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agents import Agent, Runner, RunResult, RunResultStreaming, Tool, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call

Result = RunResult | RunResultStreaming
Run = Callable[..., Awaitable[Result]]


async def run_plain(agent: Agent[Any], given: Any, **options: Any) -> Result:
    return await Runner.run(agent, given, **options)


async def run_streamed(agent: Agent[Any], given: Any, **options: Any) -> Result:
    result = Runner.run_streamed(agent, given, **options)
    async for _ in result.stream_events():
        pass
    return result


RUNS: dict[str, Run] = {"run": run_plain, "run_streamed": run_streamed}


def say(text: str) -> list[Any]:
    """One model step: an answer."""
    return [assistant_message(text, item_id=f"msg_{text}")]


def call(name: str, call_id: str, /, **arguments: Any) -> Any:
    """One call of a tool, as part of a model step."""
    return function_call(name, arguments, call_id=call_id, item_id=f"fc_{call_id}")


def scripted(
    steps: Sequence[Any], *, tools: Sequence[Tool] = (), **options: Any
) -> tuple[Agent[Any], ScriptedModel]:
    """Make an agent whose model gives these steps."""
    model = ScriptedModel(steps)
    name = options.pop("name", "scripted")
    return Agent(name=name, model=model, tools=list(tools), **options), model


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def outline(items: Sequence[Any]) -> list[str]:
    """Return in short what each stored item is: 'user hi', 'call c1', ..."""
    lines = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            lines.append(f"call {item['call_id']}")
        elif kind == "function_call_output":
            lines.append(f"output {item['call_id']} {item['output']}")
        elif kind == "message":
            content = item["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            lines.append(f"{item['role']} {text}")
        else:
            lines.append(kind)
    return lines
