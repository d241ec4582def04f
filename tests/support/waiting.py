"""Runs that wait for approval, as rows, for tests that start no run."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.approvals import Paused, seal, unseal
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentRun, AgentSession

HOUR = timedelta(hours=1)


def asked(tool: str = "refund", arguments: str = '{"order": 42}') -> list[Any]:
    """Return the interrupts of one call."""
    about = {"toolName": tool, "arguments": arguments}
    return [{"id": "c1", "toolCallId": "c1", "reason": "tool_call", "metadata": about}]


def wait(
    row: AgentSession,
    run_id: str = "run-1",
    *,
    interrupts: Any = None,
    state: Any = None,
    expires_in: timedelta = HOUR,
    **columns: Any,
) -> AgentRun:
    """Make a session wait for a run of its own; `columns` are the row's."""
    moment = (timezone.now() + expires_in).timestamp()
    AgentSession.objects.filter(pk=row.pk).update(state="waiting")
    columns = {"branch": row.branch, "status": "waiting", **columns}
    columns.setdefault("expires_at", datetime.fromtimestamp(moment, UTC))
    run = AgentRun.objects.create(session=row, run_id=run_id, **columns)
    paused = Paused(
        json.dumps(state or {}), asked() if interrupts is None else interrupts, moment
    )
    fence = AgentSession.objects.get(pk=row.pk).fence
    key = SessionKey(row.session_id, row.user_id)
    run.state = seal(sessions[row.backend], key, run, fence, paused)
    run.save(update_fields=["state"])
    return run


def opened(run_id: str) -> Paused:
    """Open what a waiting run has stored."""
    run = AgentRun.objects.select_related("session").get(run_id=run_id)
    key = SessionKey(run.session.session_id, run.session.user_id)
    return unseal(sessions[run.session.backend], key, run)


def reseal(run_id: str, **changes: Any) -> None:
    """Store something else for a waiting run, as only who has the keys can."""
    run = AgentRun.objects.select_related("session").get(run_id=run_id)
    row = run.session
    key = SessionKey(row.session_id, row.user_id)
    paused = replace(opened(run_id), **changes)
    run.state = seal(sessions[row.backend], key, run, row.fence, paused)
    run.save(update_fields=["state"])
