"""Sessions that are encrypted before any other backend stores them."""

from __future__ import annotations

from agent_sessions.backends.encrypted.backend import EncryptedBackend

__all__ = ["EncryptedBackend"]
