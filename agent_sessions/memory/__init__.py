"""Sessions as the SDK's Runner sees them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_sessions.memory.base import BackendSession, SyncSession
from agent_sessions.memory.sdk import mark_sdk

if TYPE_CHECKING:
    from agent_sessions.memory.dapr import DaprSession
    from agent_sessions.memory.django import DjangoSession
    from agent_sessions.memory.openai import OpenAIConversationsSession
    from agent_sessions.memory.redis import RedisSession

# Resolved on first use: some need Django's settings, others an extra.
_EXPORTS = {
    "DaprSession": "agent_sessions.memory.dapr",
    "DjangoSession": "agent_sessions.memory.django",
    "OpenAIConversationsSession": "agent_sessions.memory.openai",
    "RedisSession": "agent_sessions.memory.redis",
}

mark_sdk()

__all__ = [
    "BackendSession",
    "DaprSession",
    "DjangoSession",
    "OpenAIConversationsSession",
    "RedisSession",
    "SyncSession",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
