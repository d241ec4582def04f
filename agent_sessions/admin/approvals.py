"""The approvals that a paused run waits for, as its row has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from agent_sessions.backends.base import SessionKey
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun
from agent_sessions.transcript import Part
from agent_sessions.transcript.parts import maybe_json, objects, string


@dataclass(frozen=True, slots=True)
class Approval:
    """What a person is asked: whether a tool may be called with these arguments."""

    id: str
    tool: str
    arguments: tuple[Part, ...]


def approvals(run: AgentRun) -> list[Approval]:
    """Read the open approvals of a run; what is no approval is left out."""
    try:
        found: Any = json.loads(_opened(run) or "[]")
    except (ValueError, RecursionError, AgentSessionError):
        return []
    asked = []
    for interrupt in objects(found):
        about = interrupt.get("metadata")
        about = about if isinstance(about, dict) else {}
        asked.append(
            Approval(
                string(interrupt.get("id")),
                string(about.get("toolName")),
                maybe_json(about.get("arguments")),
            )
        )
    return asked


def _opened(run: AgentRun) -> str:
    text: str = run.interrupts
    if not text.startswith('{"__enc__"'):
        return text
    row = run.session
    return sessions[row.backend].open_text(
        SessionKey(row.session_id, row.user_id), text
    )
