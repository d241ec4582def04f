"""Sessions in a Django database."""

from __future__ import annotations

from agent_sessions.backends.database.backend import DatabaseBackend

__all__ = ["DatabaseBackend"]
