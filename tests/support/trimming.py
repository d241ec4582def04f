"""Keep the last turns of sessions, or count what that would remove."""

from __future__ import annotations

from dataclasses import replace

from agent_sessions.models import AgentSession
from agent_sessions.retention import Removal, foresee, remove


def trim(row: AgentSession, keep: int, how: Removal | None = None) -> int | None:
    return remove(row, replace(how or Removal(), keep_turns=keep))


def count_trimmed(row: AgentSession, keep: int) -> int | None:
    found = foresee(row, Removal(keep_turns=keep))
    if isinstance(found, Exception):
        raise found
    return found
