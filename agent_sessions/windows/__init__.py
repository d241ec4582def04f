"""Windows on a history: ready `session_input_callback`s for the SDK's RunConfig.

They choose what a model sees and change nothing that is stored.
"""

from __future__ import annotations

from agent_sessions.windows.tokens import (
    TokenCounter,
    count_tokens,
    estimate_tokens,
    tiktoken_counter,
)
from agent_sessions.windows.turns import (
    MARKER,
    SessionInputCallback,
    Window,
    chain,
    drop_old_tool_outputs,
    keep_system_prefix,
    last_turns,
    token_budget,
    whole_turns,
)

__all__ = [
    "MARKER",
    "SessionInputCallback",
    "TokenCounter",
    "Window",
    "chain",
    "count_tokens",
    "drop_old_tool_outputs",
    "estimate_tokens",
    "keep_system_prefix",
    "last_turns",
    "tiktoken_counter",
    "token_budget",
    "whole_turns",
]
