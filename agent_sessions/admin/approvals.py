"""The approvals that paused runs wait for: those that can be given now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.utils import timezone

from agent_sessions.approvals import find_open
from agent_sessions.models import AgentRun
from agent_sessions.transcript import Part
from agent_sessions.transcript.parts import maybe_json, objects, string


@dataclass(frozen=True, slots=True)
class Approval:
    """What a person is asked: whether a tool may be called with these arguments."""

    call_id: str
    tool: str
    arguments: tuple[Part, ...]
    expires_at: datetime


def approvals(runs: Iterable[AgentRun]) -> dict[int, list[Approval]]:
    """Read the open approvals of runs, by the runs' keys, in a fixed number of queries.

    What was changed, answered, moved here or is over is left out, and so is what is
    no approval.
    """
    waiting = [run for run in runs if run.status == AgentRun.Status.WAITING]
    if not waiting:
        return {}
    rows = AgentRun.objects.using(waiting[0]._state.db)
    found, zone = {}, timezone.get_current_timezone()
    for run, paused in find_open(rows.filter(pk__in=[run.pk for run in waiting])):
        expires_at = datetime.fromtimestamp(paused.expires_at, zone)
        found[run.pk] = [
            _approval(interrupt, expires_at) for interrupt in objects(paused.interrupts)
        ]
    return found


def _approval(interrupt: Mapping[str, Any], expires_at: datetime) -> Approval:
    about = interrupt.get("metadata")
    about = about if isinstance(about, dict) else {}
    return Approval(
        string(interrupt.get("toolCallId")),
        string(about.get("toolName")),
        maybe_json(about.get("arguments")),
        expires_at,
    )
