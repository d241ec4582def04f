"""A model that needs no key and no network: the demo's answers, streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

from agents.agent_output import AgentOutputSchemaBase
from agents.handoffs import Handoff
from agents.items import (
    ModelResponse,
    TResponseInputItem,
    TResponseOutputItem,
    TResponseStreamEvent,
)
from agents.model_settings import ModelSettings
from agents.models.interface import Model, ModelTracing
from agents.tool import Tool
from agents.usage import Usage
from openai.types import responses as api
from openai.types.responses import response_reasoning_item as reasoning
from openai.types.responses.response_prompt_param import ResponsePromptParam
from openai.types.responses.response_usage import (
    InputTokensDetails,
    OutputTokensDetails,
)

from example_project.demo_answers import Answer, Question, answer
from example_project.demo_stream import new_id, stream


class DemoModel(Model):
    """Answer from the history with a few rules, one word after the other."""

    def __init__(self, *, delay: float = 0.03) -> None:
        self.delay = delay

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> ModelResponse:
        """Return the whole answer at once."""
        said = _decide(input, tools, handoffs)
        output, usage = _output(said), _usage(system_instructions, input, said)
        return ModelResponse(
            output=output,
            usage=Usage(
                requests=1,
                input_tokens=usage.input_tokens,
                input_tokens_details=usage.input_tokens_details,
                output_tokens=usage.output_tokens,
                output_tokens_details=usage.output_tokens_details,
                total_tokens=usage.total_tokens,
            ),
            response_id=new_id("resp"),
        )

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Stream the answer as the Responses API would, with a breath after each word."""
        said = _decide(input, tools, handoffs)
        output, usage = _output(said), _usage(system_instructions, input, said)
        for event in stream(output, usage):
            if event.type.endswith(".delta"):
                await asyncio.sleep(self.delay)
            yield event


def _decide(
    input: str | list[TResponseInputItem], tools: list[Tool], handoffs: list[Handoff]
) -> Answer:
    items = input if isinstance(input, str) else cast("list[dict[str, Any]]", input)
    question = Question.read(
        items,
        tools={tool.name for tool in tools},
        handoffs={handoff.tool_name for handoff in handoffs},
    )
    return answer(question)


def _output(said: Answer) -> list[TResponseOutputItem]:
    output: list[TResponseOutputItem] = []
    if said.thoughts:
        summary = reasoning.Summary(text=said.thoughts, type="summary_text")
        output.append(
            api.ResponseReasoningItem(
                id=new_id("rs"), summary=[summary], type="reasoning", status="completed"
            )
        )
    if said.text:
        text = api.ResponseOutputText(
            text=said.text, type="output_text", annotations=[], logprobs=[]
        )
        output.append(
            api.ResponseOutputMessage(
                id=new_id("msg"),
                content=[text],
                role="assistant",
                status="completed",
                type="message",
            )
        )
    output.extend(
        api.ResponseFunctionToolCall(
            id=new_id("fc"),
            call_id=new_id("call"),
            name=call.name,
            arguments=json.dumps(call.arguments),
            type="function_call",
            status="completed",
        )
        for call in said.calls
    )
    return output


def _usage(
    instructions: str | None, input: str | list[TResponseInputItem], said: Answer
) -> api.ResponseUsage:
    """Estimate the tokens at four characters each, as plausible as a guess can be."""
    read = len(instructions or "") + len(json.dumps(input, default=str))
    calls = "".join(f"{call.name}{json.dumps(call.arguments)}" for call in said.calls)
    wrote = len(said.thoughts) + len(said.text) + len(calls)
    input_tokens, output_tokens = read // 4 + 1, wrote // 4 + 1
    return api.ResponseUsage(
        input_tokens=input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=output_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=len(said.thoughts) // 4
        ),
        total_tokens=input_tokens + output_tokens,
    )
