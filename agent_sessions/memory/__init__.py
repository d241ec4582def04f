"""Sessions as the SDK's Runner sees them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_sessions.memory.base import BackendSession, SyncSession

if TYPE_CHECKING:
    from agent_sessions.memory.django import DjangoSession
    from agent_sessions.memory.redis import RedisSession

# Resolved on first use: the first needs Django's settings, the other an extra.
_EXPORTS = {
    "DjangoSession": "agent_sessions.memory.django",
    "RedisSession": "agent_sessions.memory.redis",
}

__all__ = ["BackendSession", "DjangoSession", "RedisSession", "SyncSession"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
