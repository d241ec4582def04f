"""Token usage of a run, as its row keeps it and as clients are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.usage import Usage


def columns(usage: Usage) -> dict[str, int]:
    """Give the token columns of a run's or a session's row."""
    return {
        "requests": usage.requests,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.input_tokens_details.cached_tokens or 0,
        "reasoning_tokens": usage.output_tokens_details.reasoning_tokens or 0,
    }


def difference(usage: Usage, before: dict[str, int]) -> Usage:
    """Give what was used since `before`.

    A resumed run counts on from what its first part used.
    """
    from agents.usage import Usage
    from openai.types.responses.response_usage import OutputTokensDetails

    used = {
        name: max(value - before.get(name, 0), 0)
        for name, value in columns(usage).items()
    }
    details = usage.input_tokens_details.model_copy(
        update={"cached_tokens": used["cached_tokens"]}
    )
    return Usage(
        requests=used["requests"],
        input_tokens=used["input_tokens"],
        input_tokens_details=details,
        output_tokens=used["output_tokens"],
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=used["reasoning_tokens"]
        ),
        total_tokens=used["input_tokens"] + used["output_tokens"],
    )


def as_json(usage: Usage) -> dict[str, Any]:
    """Give the details that have no column of their own."""
    from agents.usage import serialize_usage

    details: dict[str, Any] = serialize_usage(usage)
    return details
