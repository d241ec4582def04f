"""Make stored items readable: pure functions, no Django, no SDK.

`parse` understands one item, `join` puts a page of them together. Both are total:
whatever a row holds gives an entry.
"""

from __future__ import annotations

from agent_sessions.transcript.parse import Line, join, parse
from agent_sessions.transcript.parts import Entry, Kind, Part, PartKind

__all__ = ["Entry", "Kind", "Line", "Part", "PartKind", "join", "parse"]
