"""A conformance kit for session stores: inherit SessionContract and run pytest.

Needs the extra `testing`, and imports the SDK; no Django settings are read.
"""

from __future__ import annotations

from agent_sessions.exceptions import extra

with (
    extra("testing", "pytest", needed_by=__name__),
    extra("testing", "hypothesis", needed_by=__name__),
):
    from agent_sessions.testing.contract import SessionContract

__all__ = ["SessionContract"]
