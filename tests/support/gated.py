"""A model that streams word by word and waits where a test wants it to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

from agents import Agent, Model, ModelResponse
from agents.testing import assistant_message
from openai.types.responses import ResponseUsage

from example_project.demo_stream import stream

USAGE = ResponseUsage.model_validate(
    {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
)


class GatedModel(Model):
    """Answer `text`; the gate is closed before the word number `pause_at`."""

    def __init__(self, text: str, pause_at: int = 2) -> None:
        self.text = text
        self.pause_at = pause_at
        self.calls: list[Any] = []
        self.paused = asyncio.Event()
        self.gate = asyncio.Event()

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        raise AssertionError("runs over a socket are streamed")

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        self.calls.append(args[1])
        message = assistant_message(self.text, item_id=f"msg_{len(self.calls)}")
        words = 0
        for event in stream([message], USAGE):
            if event.type.endswith(".delta"):
                if words == self.pause_at:
                    self.paused.set()
                    await self.gate.wait()
                words += 1
                await asyncio.sleep(0)
            yield event


def gated(text: str, pause_at: int = 2) -> tuple[Agent[Any], GatedModel]:
    """Make an agent that speaks through a gate."""
    model = GatedModel(text, pause_at)
    return Agent(name="speaker", model=model), model


def words(text: str) -> list[str]:
    """Split as the stream does."""
    return re.findall(r"\S+\s*", text)
