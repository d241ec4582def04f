"""Make stored items readable: pure functions, no Django, no SDK.

`parse` understands one item, `join` puts a page of them together. Both are total:
whatever a row holds gives an entry.
"""

from __future__ import annotations

from agent_sessions.transcript.entries import Entry, Kind, Part, PartKind
from agent_sessions.transcript.join import Line, join
from agent_sessions.transcript.parse import parse

__all__ = ["Entry", "Kind", "Line", "Part", "PartKind", "join", "parse"]
