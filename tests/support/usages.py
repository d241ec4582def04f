"""Models that say what they used, and results that do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agents import Agent, FunctionTool, Runner, RunResult, function_tool
from agents.extensions.memory import AdvancedSQLiteSession
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call
from agents.usage import Usage
from openai.types.responses.response_usage import (
    InputTokensDetails,
    OutputTokensDetails,
)

from agent_sessions.exceptions import BranchDoesNotExist


def used(
    tokens: int = 7, output: int = 1, *, cached: int = 0, reasoning: int = 0
) -> Usage:
    """One request's usage."""
    return Usage(
        requests=1,
        input_tokens=tokens,
        output_tokens=output,
        total_tokens=tokens + output,
        input_tokens_details=InputTokensDetails.model_validate(
            {"cached_tokens": cached, "cache_write_tokens": 0}
        ),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning),
    )


def say(text: str, usage: Usage | None = None) -> ModelStep:
    """A model's step that answers."""
    return ModelStep(output=[assistant_message(text)], usage=usage or used())


def call(tool: str, call_id: str = "call_1", **arguments: Any) -> ModelStep:
    """A model's step that calls a tool."""
    return ModelStep(
        output=[function_call(tool, arguments, call_id=call_id)], usage=used()
    )


def agent(*steps: Any, **options: Any) -> Agent[Any]:
    """An agent that follows a script."""
    options.setdefault("name", "speaker")
    return Agent(model=ScriptedModel(list(steps)), **options)


async def ask(session: Any, text: str, usage: Usage | None = None) -> RunResult:
    """Run one turn on a session."""
    return await Runner.run(agent(say("ok", usage)), text, session=session)


async def store(session: Any, tokens: int) -> None:
    """Store what a run on no session used for the session's last turn."""
    await session.store_run_usage(await ask(None, "elsewhere", used(tokens)))


@asynccontextmanager
async def advanced(path: Path) -> AsyncIterator[Any]:
    """Open the SDK's session, whose answers ours must equal."""
    session = AdvancedSQLiteSession(
        session_id="s", db_path=path / "advanced.db", create_tables=True
    )
    try:
        yield session
    finally:
        session.close()


def standing() -> tuple[FunctionTool, asyncio.Event]:
    """Make a tool that never comes back, and an event that says that it was called."""
    called = asyncio.Event()

    async def stand_still() -> str:
        """Wait forever."""
        called.set()
        await asyncio.sleep(60)
        return "never"

    return function_tool(stand_still), called


async def nothing(reading: Awaitable[Any]) -> bool:
    """Assert that a missing branch has nothing to read.

    That is empty in the SDK and an error here: the one documented difference.
    """
    try:
        return not await reading
    except BranchDoesNotExist:
        return True
