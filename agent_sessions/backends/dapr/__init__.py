"""Sessions in a Dapr state store: DaprBackend."""

from __future__ import annotations

from agent_sessions.backends.dapr.backend import DaprBackend

__all__ = ["DaprBackend"]
