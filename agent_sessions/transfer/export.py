"""Write sessions in our own format, agent-sessions/1: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from django.db.models import OuterRef, Subquery

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.reading import read_history
from agent_sessions.characters import ascii_json
from agent_sessions.exceptions import InvalidItem
from agent_sessions.handler import sessions
from agent_sessions.items import StoredItem, decode, encode_batch
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.times import iso

FORMAT = "agent-sessions/1"
# The key of a session's metadata that says where it was imported from, and how far.
MARKER = "import"
TOKENS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
)
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

_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@dataclass(slots=True)
class Tally:
    """What an export has written so far."""

    items: int = 0
    # Sessions whose items are encrypted in their store, and in clear in the export.
    opened: int = 0


def export_session(row: AgentSession, tally: Tally | None = None) -> Iterator[str]:
    """Return the pieces of a session's line, its newline included.

    Memory doesn't grow with the history. What other stores than Django's databases
    have is read through their backend, twice: encrypted items come out in clear where
    the backend has their key. Raises what the store raises.
    """
    backend = sessions[row.backend]
    using = row._state.db or backend.directory.using
    stored = backend.in_database is not None
    branches = list(
        Branch._base_manager.using(using)
        .filter(session_id=row.pk)
        .select_related("parent")
        .order_by("pk")
    )
    runs = AgentRun._base_manager.using(using).filter(session_id=row.pk)
    described = (
        [_branch(branch) for branch in branches] if stored else [_only(backend, row)]
    )
    yield f'{{"format":{_encode(FORMAT)},"session":'
    # An import keeps what is in clear in the file in clear, so it has to know.
    facts: dict[str, Any] = {"encrypted": True} if backend.encrypts else {}
    facts |= {} if stored else {"branch": MAIN_BRANCH}
    yield _encode(describe_session(row) | facts)
    yield ',"branches":'
    yield _encode(described)
    yield ',"runs":['
    opened = SessionItem._base_manager.using(using).filter(pk=OuterRef("turn_item"))
    runs = runs.select_related("branch").annotate(
        opened_on=Subquery(opened.values("branch__name")),
        opened_at=Subquery(opened.values("position")),
    )
    for index, run in enumerate(runs.order_by("pk").iterator()):
        yield f"{',' * bool(index)}{_encode(_run(run))}"
    yield '],"items":['
    separator = ""
    found = (
        (item for branch in branches for item in _items_of(using, branch))
        if stored
        else (_item(MAIN_BRANCH, item) for item in _counted(backend, row))
    )
    count = 0
    for item in found:
        yield separator + item
        separator = ","
        count += 1
    yield "]}\n"
    if tally is not None:
        tally.items += count
        tally.opened += backend.encrypts


def _encode(value: Any) -> str:
    return ascii_json(_encoder.encode(value))


def describe_item(row: StoredItem) -> str:
    """Return an item as JSON, with its place; an unreadable one as its raw text."""
    return _item(None, row)


def _only(backend: BaseSessionBackend, row: AgentSession) -> dict[str, Any]:
    """Describe the one line of a history in a store that has no branches."""
    head = turn = 0
    for item in _counted(backend, row):
        head, turn = item.position, item.turn
    return {
        "name": MAIN_BRANCH,
        "parent": None,
        "fork_position": None,
        "head": head,
        "turn": turn,
        "created_at": _time(row.created_at),
        "archived": False,
    }


def _counted(backend: BaseSessionBackend, row: AgentSession) -> Iterator[StoredItem]:
    """Read a history with its turns as the user's messages make them."""
    turn = 0
    for item in read_history(backend, SessionKey(row.session_id, row.user_id)):
        turn += item.item is not None and opens_turn(item.item)
        yield replace(item, turn=turn)


def _items_of(using: str, branch: Branch) -> Iterator[str]:
    return (_item(branch.name, _stored(row)) for row in _rows(using, branch))


def _stored(row: SessionItem) -> StoredItem:
    return StoredItem(
        row.position, row.turn, decode(row.data), row.data, row.created_at
    )


def describe_session(row: AgentSession) -> dict[str, Any]:
    """Return what the directory knows of a session."""
    metadata = row.metadata if isinstance(row.metadata, dict) else {}
    return {
        "id": row.session_id,
        "backend": row.backend,
        "user": None if row.user is None else row.user.get_username(),
        "title": row.title,
        "metadata": {key: value for key, value in metadata.items() if key != MARKER},
        "branch": _branch_name(row),
        "agent_name": row.agent_name,
        "created_at": _time(row.created_at),
        "updated_at": _time(row.updated_at),
        "expires_at": _time(row.expires_at),
        **{name: getattr(row, name) for name in TOKENS},
    }


def _branch_name(row: AgentSession) -> str | None:
    """Read the current branch's name where the row lies: a replica may lag behind."""
    branches = Branch._base_manager.using(row._state.db).filter(pk=row.branch_id)
    return branches.values_list("name", flat=True).first()


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
    """Return a branch's own rows, a page at a time."""
    rows = SessionItem._base_manager.using(using).filter(branch_id=branch.pk)
    last = -1
    while True:
        page = list(rows.filter(position__gt=last).order_by("position")[:_PAGE])
        yield from page
        if len(page) < _PAGE:
            return
        last = page[-1].position


def _item(branch: str | None, row: StoredItem) -> str:
    place = {
        **({} if branch is None else {"branch": branch}),
        "position": row.position,
        "turn": row.turn,
        "created_at": _time(row.created_at),
    }
    if row.item is None:
        return _encode({**place, "raw": row.raw})
    try:
        data = encode_batch([row.item]).rows[0].data
    except InvalidItem:
        return _encode({**place, "raw": row.raw})
    return f'{_encode(place)[:-1]},"item":{ascii_json(data)}}}'


def _time(value: datetime | None) -> str | None:
    return None if value is None else iso(value)
