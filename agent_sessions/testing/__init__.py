"""A conformance kit for session stores: inherit SessionContract and run pytest.

Needs pytest and hypothesis, and imports the SDK; no Django settings are read.
"""

from __future__ import annotations

from agent_sessions.testing.contract import SessionContract

__all__ = ["SessionContract"]
