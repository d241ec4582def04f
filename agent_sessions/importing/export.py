"""Write sessions in our own format, agent-sessions/1: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from django.db.models import OuterRef, Subquery

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.exceptions import InvalidItem
from agent_sessions.handler import sessions
from agent_sessions.importing.records import UnreadableSource
from agent_sessions.importing.runs import TOKENS
from agent_sessions.importing.target import MARKER
from agent_sessions.items import decode, encode_batch
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem

FORMAT = "agent-sessions/1"
# What a run's object has beside its id, branch and times. Not its state: that is
# the SDK's and holds the whole conversation again.
RUN_COLUMNS = (
    "agent_name",
    "model",
    "status",
    "first_position",
    "last_position",
    *TOKENS,
    "total_tokens",
    "usage",
    "error_code",
    "trace_id",
    "sdk_version",
)
_PAGE = 200

_encode = json.JSONEncoder(
    ensure_ascii=True, allow_nan=False, separators=(",", ":")
).encode


def export_session(row: AgentSession) -> Iterator[str]:
    """Give the pieces of a session's line, its newline included.

    Memory doesn't grow with the history. Raises UnreadableSource for a session whose
    items aren't in a database of Django.
    """
    backend = sessions[row.backend]
    if not isinstance(backend, DatabaseBackend):
        raise UnreadableSource(
            f"Session {row.session_id!r} is kept by {type(backend).__name__}; only "
            "those of DatabaseBackend can be exported."
        )
    using = backend.using
    branches = list(
        Branch.objects.using(using)
        .filter(session_id=row.pk)
        .select_related("parent")
        .order_by("pk")
    )
    runs = AgentRun.objects.using(using).filter(session_id=row.pk)
    yield f'{{"format":{_encode(FORMAT)},"session":'
    yield _encode(_session(row))
    yield ',"branches":'
    yield _encode([_branch(branch) for branch in branches])
    yield ',"runs":['
    opened = SessionItem.objects.using(using).filter(pk=OuterRef("turn_item"))
    runs = runs.select_related("branch").annotate(
        opened_on=Subquery(opened.values("branch__name")),
        opened_at=Subquery(opened.values("position")),
    )
    for index, run in enumerate(runs.order_by("pk").iterator()):
        yield f"{',' * bool(index)}{_encode(_run(run))}"
    yield '],"items":['
    separator = ""
    for branch in branches:
        for item in _rows(using, branch):
            yield separator + _item(branch.name, item)
            separator = ","
    yield "]}\n"


def _session(row: AgentSession) -> dict[str, Any]:
    metadata = row.metadata if isinstance(row.metadata, dict) else {}
    return {
        "id": row.session_id,
        "user": None if row.user is None else row.user.get_username(),
        "title": row.title,
        "metadata": {key: value for key, value in metadata.items() if key != MARKER},
        "branch": None if row.branch is None else row.branch.name,
        "agent_name": row.agent_name,
        "created_at": _time(row.created_at),
        "updated_at": _time(row.updated_at),
        "expires_at": _time(row.expires_at),
        **{name: getattr(row, name) for name in TOKENS},
    }


def _branch(branch: Branch) -> dict[str, Any]:
    return {
        "name": branch.name,
        "parent": None if branch.parent is None else branch.parent.name,
        "fork_position": branch.fork_position,
        "head": branch.head,
        "turn": branch.turn,
        "created_at": _time(branch.created_at),
        "archived": branch.archived_at is not None,
    }


def _run(run: Any) -> dict[str, Any]:
    opening = None
    if run.opened_on is not None:
        opening = {"branch": run.opened_on, "position": run.opened_at}
    return {
        "id": run.run_id,
        "branch": None if run.branch is None else run.branch.name,
        "opening": opening,
        "started_at": _time(run.started_at),
        "finished_at": _time(run.finished_at),
        **{name: getattr(run, name) for name in RUN_COLUMNS},
    }


def _rows(using: str, branch: Branch) -> Iterator[SessionItem]:
    """Give a branch's own rows, a page at a time."""
    rows = SessionItem.objects.using(using).filter(branch_id=branch.pk)
    last = -1
    while True:
        page = list(rows.filter(position__gt=last).order_by("position")[:_PAGE])
        yield from page
        if len(page) < _PAGE:
            return
        last = page[-1].position


def _item(branch: str, row: SessionItem) -> str:
    place = {
        "branch": branch,
        "position": row.position,
        "turn": row.turn,
        "created_at": _time(row.created_at),
    }
    try:
        data = encode_batch([decode(row.data)]).rows[0].data
    except InvalidItem:
        return _encode({**place, "raw": row.data})
    return f'{_encode(place)[:-1]},"item":{data}}}'


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()
