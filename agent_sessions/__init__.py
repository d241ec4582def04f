"""Keep the conversations of OpenAI Agents SDK runs in Django."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_sessions.handler import get_session, sessions
    from agent_sessions.memory import (
        BackendSession,
        DaprSession,
        DjangoSession,
        OpenAIConversationsSession,
        RedisSession,
    )
    from agent_sessions.memory.encrypted import EncryptedSession, EncryptSession
    from agent_sessions.runs.external import SessionHooks

__version__ = "0.1.0"

# Resolved on first use: the SDK's base class costs seconds to import, and the
# handler needs settings, which an `import agent_sessions` must not.
_EXPORTS = {
    "get_session": "agent_sessions.handler",
    "sessions": "agent_sessions.handler",
    "DaprSession": "agent_sessions.memory",
    "DjangoSession": "agent_sessions.memory",
    "BackendSession": "agent_sessions.memory",
    "OpenAIConversationsSession": "agent_sessions.memory",
    "RedisSession": "agent_sessions.memory",
    "EncryptedSession": "agent_sessions.memory.encrypted",
    "EncryptSession": "agent_sessions.memory.encrypted",
    "SessionHooks": "agent_sessions.runs.external",
}

__all__ = [
    "BackendSession",
    "DaprSession",
    "DjangoSession",
    "EncryptSession",
    "EncryptedSession",
    "OpenAIConversationsSession",
    "RedisSession",
    "SessionHooks",
    "__version__",
    "get_session",
    "sessions",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
