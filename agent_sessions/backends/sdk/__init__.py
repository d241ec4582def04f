"""Histories in any session class, of the SDK or of others."""

from __future__ import annotations

from agent_sessions.backends.sdk.backend import SDKBackend

__all__ = ["SDKBackend"]
