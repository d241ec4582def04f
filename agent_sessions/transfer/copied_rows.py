"""What the rows say of a copied session: owner, title, metadata, usage, runs."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import F

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.directory import active
from agent_sessions.backends.reading import place_of, read_history
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.times import aware, moment, stored
from agent_sessions.transfer.export import MARKER as IMPORTED
from agent_sessions.transfer.export import RUN_COLUMNS, ended
from agent_sessions.usage import COUNTERS

# The key of a copy's metadata: of which backend it is, and what was counted then.
MARKER = "copied_from"
_PAGE = 200


def mark_of(row: AgentSession | None) -> dict[str, Any]:
    """Return what a copy's row says of where it comes from; {} for any other."""
    metadata = {} if row is None else row.metadata
    found = metadata.get(MARKER) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def copy_row(
    source: BaseSessionBackend,
    target: BaseSessionBackend,
    here: AgentSession,
    there: AgentSession,
) -> bool:
    """Copy what a session's row and its runs say; tell whether anything was new."""
    using = target.directory.using
    marker = mark_of(there)
    if not marker:
        # A session of its own that says the same: its row is left alone.
        return False
    known = set(run_rows.runs_of(using, there.pk).values_list("run_id", flat=True))
    runs = [
        run
        for run in run_rows.runs_of(source.directory.using, here.pk).order_by("pk")
        if run.run_id not in known
    ]
    # What an import wrote down is true of the source's branches alone.
    metadata = {k: v for k, v in here.metadata.items() if k not in {MARKER, IMPORTED}}
    counted = {name: getattr(here, name) for name in COUNTERS}
    wanted = {
        # Titles of encrypted sessions are not told.
        "title": "" if target.encrypts else here.title,
        "agent_name": here.agent_name,
        "expires_at": here.expires_at,
        "created_at": here.created_at,
        "metadata": {**metadata, MARKER: {"backend": here.backend, "usage": counted}},
    }
    if not runs and all(getattr(there, name) == wanted[name] for name in wanted):
        return False
    before = marker.get("usage") or {}
    more = {name: F(name) + counted[name] - before.get(name, 0) for name in COUNTERS}
    with transaction.atomic(using):
        AgentSession.objects.using(using).filter(pk=there.pk).update(
            **wanted, **more, **active(here.updated_at)
        )
        rows = None
        if target.in_database is not None:
            rows = SessionItem._base_manager.using(target.in_database.using).filter(
                branch_id=there.branch_id
            )
        names = {(at, when) for run in runs for at, _, when in run.message_ids}
        places = _copy_times(source, target, here, rows, names)
        copies = [_copy_run(run, there, places, rows) for run in runs]
        run_rows.copy(using, copies)
    return True


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the items lie in the source and in the target, in their order.

    `named` are place and time in the target of what has an id in the source.
    """

    here: array[int]
    there: array[int]
    named: dict[tuple[int, str], tuple[int, str]]


def _copy_times(
    source: BaseSessionBackend,
    target: BaseSessionBackend,
    row: AgentSession,
    rows: Any,
    names: set[tuple[int, str]],
) -> _Places:
    """Say of each item when it was written first, and find where each lies."""
    key = SessionKey(row.session_id, row.user_id)
    places = _Places(array("q"), array("q"), {})
    times: dict[int, datetime] = {}
    for here, there in zip(
        read_history(source, key), read_history(target, key), strict=False
    ):
        places.here.append(here.position)
        places.there.append(there.position)
        if (name := place_of(here)) in names:
            # It gets the time of the source, where it can.
            when = place_of(there)[1] if rows is None else moment(here.created_at)
            places.named[name] = there.position, when
        if rows is not None:
            times[there.position] = stored(aware(here.created_at))
        if len(times) == _PAGE:
            _write_times(rows, times)
            times = {}
    _write_times(rows, times)
    return places


def _write_times(rows: Any, times: dict[int, datetime]) -> None:
    if not times:
        return
    items = list(rows.filter(position__in=times).only("position", "created_at"))
    for item in items:
        item.created_at = times[item.position]
    rows.bulk_update(items, ["created_at"])


def _copy_run(
    run: AgentRun, there: AgentSession, places: _Places, rows: Any
) -> AgentRun:
    columns = {name: getattr(run, name) for name in RUN_COLUMNS}
    columns["status"] = ended(run.status)
    columns["message_ids"] = [
        [place[0], name, place[1]]
        for at, name, when in run.message_ids
        if (place := places.named.get((at, when)))
    ]
    copy = AgentRun(
        session_id=there.pk,
        branch_id=there.branch_id,
        run_id=run.run_id,
        started_at=run.started_at,
        finished_at=run.finished_at,
        **columns,
    )
    span = _span(run, places)
    copy.first_position, copy.last_position = span or (None, None)
    if span is None:
        return copy
    copy.turn = run.turn
    if rows is not None:
        # A resumed run begins after its message, any other one with it.
        openings = rows.filter(**OPENING).values_list("pk", "turn")
        before = openings.filter(position__lte=span[0]).order_by("-position")
        within = openings.filter(position__lte=span[1]).order_by("position")
        if found := before.first() or within.first():
            copy.turn_item, copy.turn = found
    return copy


def _span(run: AgentRun, places: _Places) -> Sequence[int] | None:
    """Return where a run's first and last item lie there, None if they are gone."""
    here, there = places.here, places.there
    if run.first_position is None or run.last_position is None:
        return None
    first = bisect_left(here, run.first_position)
    last = bisect_right(here, run.last_position) - 1
    return (there[first], there[last]) if first <= last else None
