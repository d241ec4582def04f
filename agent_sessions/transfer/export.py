"""Write sessions as JSON, in our own format agent-sessions/1, or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from django.db.models import OuterRef, Subquery

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database.lineage import read_pages
from agent_sessions.backends.reading import read_history
from agent_sessions.characters import ascii_json
from agent_sessions.exceptions import InvalidItem
from agent_sessions.items import StoredItem, decode, encode_batch
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.retention import store_of
from agent_sessions.times import iso
from agent_sessions.transcript.markdown import markdown
from agent_sessions.transfer import Report
from agent_sessions.usage import COUNTERS

FORMAT = "agent-sessions/1"
# The key of a session's metadata that says where it was imported from, and how far.
MARKER = "import"
# What a run keeps wherever it goes, beside its id, branch and times. Not its state:
# that is the SDK's and holds the whole conversation again.
RUN_COLUMNS = (
    "agent_name",
    "model",
    "status",
    "first_position",
    "last_position",
    *COUNTERS,
    "total_tokens",
    "usage",
    "message_ids",
    "error_code",
    "trace_id",
    "sdk_version",
)
_PAGE = 200
T = TypeVar("T")

_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def export_session(row: AgentSession, report: Report | None = None) -> Iterator[str]:
    """Return the pieces of a session's lines, their newlines included.

    Memory doesn't grow with the history. What other stores than Django's databases
    have is read through their backend: encrypted items come out in clear where
    the backend has their key. Raises what the store raises.
    """
    backend, key = store_of(row)
    using = backend.directory.using
    described = describe_session(row)
    if backend.encrypts:
        # An import keeps what is in clear in the file in clear, so it has to know.
        described["encrypted"] = True
    labels: dict[int, str] = {}
    if backend.in_database is not None:
        branches = _read_branches(using, row)
        labels = {branch.pk: branch.label for branch in branches}
        shapes = [_branch(branch, labels) for branch in branches]
        items = (
            describe_item(item, branch.label)
            for branch in branches
            for item in read_branch(using, branch.pk)
        )
    else:
        described["branch"] = MAIN_BRANCH
        # Its items tell the rest.
        shapes = [{"name": MAIN_BRANCH, "created_at": _time(row.created_at)}]
        stored = _begun(_with_turns(backend, key))
        items = (describe_item(item, MAIN_BRANCH) for item in stored)
    head = {"format": FORMAT, "session": described, "branches": shapes}
    yield f'{_encode(head)[:-1]},"runs":['
    separator = ""
    for run in _read_runs(using, row):
        yield separator + _encode(_run(run, labels))
        separator = ","
    yield "]}\n"
    report = report or Report()
    before = report.items
    for item in _counted(items, report):
        yield f"{item}\n"
    yield f'{{"items":{report.items - before}}}\n'
    report.opened += backend.encrypts


def export_markdown(row: AgentSession, report: Report | None = None) -> Iterator[str]:
    """Return the lines of a session as people read it. Raises what the store raises."""
    backend, key = store_of(row)
    facts = (
        ("Backend", row.backend),
        ("Owner", "" if row.user is None else row.user.get_username()),
        ("Created", iso(row.created_at)),
        ("Last activity", iso(row.updated_at)),
    )
    report = report or Report()
    items = _counted(_begun(read_history(backend, key)), report)
    for line in markdown(items, title=row.session_id, facts=facts):
        yield f"{line}\n"
    report.opened += backend.encrypts


class Form(NamedTuple):
    """A form of export: what makes it, and the ending and type of its files."""

    make: Callable[[AgentSession, Report | None], Iterator[str]]
    ending: str
    content_type: str


FORMS = {
    "json": Form(export_session, "jsonl", "application/jsonl"),
    "markdown": Form(export_markdown, "md", "text/markdown; charset=utf-8"),
}


def read_branch(using: str, branch_id: int) -> Iterator[StoredItem]:
    """Read the items that a branch has of its own, a page at a time."""
    rows = SessionItem._base_manager.using(using).filter(branch_id=branch_id)
    columns = ("position", "turn", "data", "created_at")
    for page in read_pages(rows, columns, _PAGE):
        for position, turn, data, created_at in page:
            yield StoredItem(position, turn, decode(data), data, created_at)


def ended(status: Any) -> AgentRun.Status:
    """Return a run's status elsewhere, where none goes on. Raises ValueError."""
    found = AgentRun.Status(status)
    going_on = {AgentRun.Status.RUNNING, AgentRun.Status.WAITING}
    return AgentRun.Status.INTERRUPTED if found in going_on else found


def describe_session(row: AgentSession) -> dict[str, Any]:
    metadata = row.metadata if isinstance(row.metadata, dict) else {}
    # Read where the row lies: a replica may lag behind.
    branches = Branch._base_manager.using(row._state.db).filter(pk=row.branch_id)
    return {
        "id": row.session_id,
        "backend": row.backend,
        "user": None if row.user is None else row.user.get_username(),
        "title": row.title,
        "metadata": {key: value for key, value in metadata.items() if key != MARKER},
        "branch": branches.values_list("name", flat=True).first(),
        "agent_name": row.agent_name,
        "created_at": _time(row.created_at),
        "updated_at": _time(row.updated_at),
        "expires_at": _time(row.expires_at),
        **{name: getattr(row, name) for name in COUNTERS},
    }


def _encode(value: Any) -> str:
    return ascii_json(_encoder.encode(value))


def _counted(items: Iterable[T], report: Report) -> Iterator[T]:
    for item in items:
        report.items += 1
        yield item


def _begun(items: Iterator[StoredItem]) -> Iterator[StoredItem]:
    """Read the first item now: a store that fails does so before anything is sent."""
    return chain(list(islice(items, 1)), items)


def _read_branches(using: str, row: AgentSession) -> list[Branch]:
    rows = Branch._base_manager.using(using).filter(session_id=row.pk)
    return list(rows.order_by("pk"))


def _read_runs(using: str, row: AgentSession) -> Iterator[Any]:
    opened = SessionItem._base_manager.using(using).filter(pk=OuterRef("turn_item"))
    runs: Any = AgentRun._base_manager.using(using).filter(session_id=row.pk)
    yield from (
        runs.annotate(
            opened_on=Subquery(opened.values("branch_id")),
            opened_at=Subquery(opened.values("position")),
        )
        .order_by("pk")
        .iterator()
    )


def _with_turns(backend: BaseSessionBackend, key: SessionKey) -> Iterator[StoredItem]:
    """Read a history with its turns as the user's messages make them."""
    turn = 0
    for item in read_history(backend, key):
        turn += item.item is not None and opens_turn(item.item)
        yield replace(item, turn=turn)


def _branch(branch: Branch, labels: dict[int, str]) -> dict[str, Any]:
    return {
        "name": branch.label,
        "parent": labels.get(branch.parent_id or 0),
        "fork_position": branch.fork_position,
        "head": branch.head,
        "turn": branch.turn,
        "created_at": _time(branch.created_at),
        "archived": branch.archived_at is not None,
        **({"quarantine": True} if branch.is_quarantine else {}),
    }


def _run(run: Any, labels: dict[int, str]) -> dict[str, Any]:
    opening = None
    if run.opened_on is not None:
        opening = {"branch": labels.get(run.opened_on), "position": run.opened_at}
    return {
        "id": run.run_id,
        "branch": labels.get(run.branch_id),
        "opening": opening,
        "started_at": _time(run.started_at),
        "finished_at": _time(run.finished_at),
        **{name: getattr(run, name) for name in RUN_COLUMNS},
    }


def describe_item(row: StoredItem, branch: str | None = None) -> str:
    """Return an item as JSON, with its place; an unreadable one as its raw text."""
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
