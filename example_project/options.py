"""What of a run the demo's page may see: all that there is."""

from __future__ import annotations

from agent_sessions.agui import StreamOptions

STREAM_OPTIONS = StreamOptions(stream_reasoning=True, expose_tools="full")
