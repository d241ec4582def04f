"""Copy histories from one backend to another, whatever these are."""

from __future__ import annotations

from agent_sessions.transfer.copy.copier import Copier, CopyProblem, Report
from agent_sessions.transfer.copy.sources import find_sources

__all__ = ["Copier", "CopyProblem", "Report", "find_sources"]
