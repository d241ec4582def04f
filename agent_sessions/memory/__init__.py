"""Sessions as the SDK's Runner sees them."""

from __future__ import annotations

from agent_sessions.memory.base import BackendSession, SyncSession
from agent_sessions.memory.django import DjangoSession

__all__ = ["BackendSession", "DjangoSession", "SyncSession"]
