"""Find what is broken in stored sessions, and mend it without destroying anything."""

from __future__ import annotations

from agent_sessions.doctor.examining import examine, restore, why_closed
from agent_sessions.doctor.findings import CODES, Finding, Quarantined, Report, Skipped

__all__ = [
    "CODES",
    "Finding",
    "Quarantined",
    "Report",
    "Skipped",
    "examine",
    "restore",
    "why_closed",
]
