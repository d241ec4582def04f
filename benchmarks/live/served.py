"""An application whose model does what a message asks for, and notes what it was sent.

The first word of a message is a stage: `text`, `tool` or `approve`; the number behind it
says how many words the answer has. BENCH_LOG is the file that takes notes, a line of JSON
each; BENCH_PACE the seconds between two words.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import django

django.setup()

from agents import Agent, Model, function_tool  # noqa: E402
from agents.testing import assistant_message, function_call  # noqa: E402
from channels.routing import URLRouter  # noqa: E402
from django.contrib.auth import get_user_model  # noqa: E402
from django.urls import path  # noqa: E402
from openai.types.responses import ResponseUsage  # noqa: E402

from agent_sessions.consumers import AgentConsumer  # noqa: E402
from agent_sessions.runs import with_shutdown  # noqa: E402
from example_project.demo_stream import stream  # noqa: E402

LOG = Path(os.environ["BENCH_LOG"])
PACE = float(os.environ["BENCH_PACE"])
# Seconds before the first word of an answer, and in a tool.
PAUSE = 0.3
USAGE = ResponseUsage.model_validate(
    {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 2,
    }
)


def note(kind: str, **more: Any) -> None:
    """Write a line that outlives the process."""
    line = json.dumps({"kind": kind, "pid": os.getpid(), **more}) + "\n"
    with LOG.open("a") as file:
        file.write(line)


@function_tool
async def look(order: str) -> str:
    """Look an order up."""
    note("began", tool="look", order=order)
    await asyncio.sleep(PAUSE)
    return f"order {order}"


@function_tool(needs_approval=True)
async def refund(order: str) -> str:
    """Refund an order."""
    note("began", tool="refund", order=order)
    await asyncio.sleep(PAUSE)
    return f"refunded {order}"


class Obedient(Model):
    """Answers as the newest message of the user asks."""

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        sent: list[Any] = args[1]
        note("asked", items=sent)
        asked = next(i for i in reversed(sent) if i.get("role") == "user")
        stage, words, order = str(asked["content"]).split()
        await asyncio.sleep(PAUSE)
        answer: Any = assistant_message(
            " ".join(f"{order}-{number}" for number in range(int(words))),
            item_id=f"msg_{time.time_ns()}",
        )
        if stage != "text" and sent[-1] is asked:
            tool = "look" if stage == "tool" else "refund"
            call_id = f"call_{time.time_ns()}"
            answer = function_call(tool, {"order": order}, call_id=call_id)
        for event in stream([answer], USAGE):
            if event.type.endswith("text.delta"):
                await asyncio.sleep(PACE)
            yield event


agent: Agent[Any] = Agent(name="served", model=Obedient(), tools=[look, refund])
# The limits of a user would end the rounds.
route: Any = path(
    "<str:session_id>/",
    AgentConsumer.as_asgi(agent=agent, max_runs_per_minute=10_000, max_sockets=50),
)
router: Any = URLRouter([route])


async def with_user(scope: Any, receive: Any, send: Any) -> None:
    """Take the user from the query string, as no real site does."""
    if scope["type"] == "websocket":
        pk = scope["query_string"].decode()
        scope["user"] = await get_user_model()._default_manager.aget(pk=pk)
        await router(scope, receive, send)


application = with_shutdown(with_user)
