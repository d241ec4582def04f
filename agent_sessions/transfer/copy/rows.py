"""What the rows say of a session: owner, title, metadata, usage, runs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import F

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.directory import active
from agent_sessions.backends.reading import read_history
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.times import aware, stored
from agent_sessions.transfer.export import MARKER as IMPORTED
from agent_sessions.usage import COUNTERS

# The key of a copy's metadata: of which backend it is, and what was counted then.
MARKER = "copied_from"
_CHUNK = 200

_ENDED = {
    AgentRun.Status.RUNNING: AgentRun.Status.INTERRUPTED,
    AgentRun.Status.WAITING: AgentRun.Status.INTERRUPTED,
}
_RUN_COLUMNS = (
    "agent_name",
    "model",
    "status",
    "started_at",
    "finished_at",
    *COUNTERS,
    "total_tokens",
    "usage",
    "error_code",
    "trace_id",
    "sdk_version",
)


def mark_of(row: AgentSession | None) -> dict[str, Any]:
    """Return what a copy's row says of where it comes from; {} for any other."""
    metadata = {} if row is None else row.metadata
    found = metadata.get(MARKER) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


@dataclass(slots=True)
class Places:
    """Where each item lies, by its number: here, there, and which open turns."""

    here: list[int] = field(default_factory=list)
    there: list[int] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)
    openings: list[int] = field(default_factory=list)

    @classmethod
    def read(
        cls, source: BaseSessionBackend, target: BaseSessionBackend, key: SessionKey
    ) -> Places:
        """Read both histories, which are alike."""
        places = cls()
        for number, (here, there) in enumerate(
            zip(read_history(source, key), read_history(target, key), strict=False)
        ):
            places.here.append(here.position)
            places.there.append(there.position)
            places.times.append(stored(aware(here.created_at)))
            item = here.item or {}
            if opens_turn(item):
                places.openings.append(number)
        return places

    def span(self, run: AgentRun) -> tuple[int, int] | None:
        """Return the numbers of a run's first and last item, None if they are gone."""
        if run.first_position is None or run.last_position is None:
            return None
        first = bisect_left(self.here, run.first_position)
        last = bisect_right(self.here, run.last_position) - 1
        return (first, last) if first <= last else None

    def turn_of(self, first: int, last: int) -> int | None:
        """Return the number of the message that opens the turn of such a run."""
        # A resumed run begins after the message, any other one with it.
        found = bisect_right(self.openings, first)
        if found < len(self.openings) and not found and self.openings[0] <= last:
            found = 1
        return self.openings[found - 1] if found else None


def finish_row(
    target: BaseSessionBackend,
    here: AgentSession,
    there: AgentSession,
    read_places: Callable[[], Places],
) -> bool:
    """Copy what a session's row and its runs say; tell whether anything was new."""
    using = target.directory.using
    marker = mark_of(there)
    if not marker:
        # A session of its own that says the same: its row is left alone.
        return False
    runs = _new_runs(using, here, there)
    metadata = {
        key: value
        for key, value in here.metadata.items()
        # What an import wrote down is true of the source's branches alone.
        if key not in {MARKER, IMPORTED}
    }
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
    places = read_places()
    before = marker.get("usage") or {}
    more = {name: F(name) + counted[name] - before.get(name, 0) for name in COUNTERS}
    with transaction.atomic(using):
        AgentSession.objects.using(using).filter(pk=there.pk).update(
            **wanted,
            **more,
            **active(here.updated_at),
        )
        copies = [_copied(target, run, there, places) for run in runs]
        run_rows.copy(using, copies)
        if target.in_database:
            _set_times(using, there, places)
    return True


def _new_runs(using: str, here: AgentSession, there: AgentSession) -> list[AgentRun]:
    known = set(
        AgentRun._base_manager.using(using)
        .filter(session_id=there.pk)
        .values_list("run_id", flat=True)
    )
    runs = AgentRun._base_manager.using(here._state.db).filter(session_id=here.pk)
    return [run for run in runs.order_by("pk") if run.run_id not in known]


def _set_times(using: str, there: AgentSession, places: Places) -> None:
    """Say of each item when it was written first."""
    items = SessionItem._base_manager.using(using).filter(branch_id=there.branch_id)
    for start in range(0, len(places.there), _CHUNK):
        times = dict(
            zip(
                places.there[start : start + _CHUNK],
                places.times[start : start + _CHUNK],
                strict=True,
            )
        )
        rows = list(items.filter(position__in=times).only("position", "created_at"))
        for row in rows:
            row.created_at = times[row.position]
        items.bulk_update(rows, ["created_at"])


def _copied(
    target: BaseSessionBackend, run: AgentRun, there: AgentSession, places: Places
) -> AgentRun:
    columns = {name: getattr(run, name) for name in _RUN_COLUMNS}
    columns["status"] = _ENDED.get(AgentRun.Status(run.status), run.status)
    copy = AgentRun(
        session_id=there.pk, branch_id=there.branch_id, run_id=run.run_id, **columns
    )
    span = places.span(run)
    if span is None:
        return copy
    first, last = span
    copy.first_position, copy.last_position = places.there[first], places.there[last]
    copy.turn = run.turn
    opening = places.turn_of(first, last)
    if opening is not None and (rows := target.in_database) is not None:
        found = (
            SessionItem._base_manager.using(rows.using)
            .filter(branch_id=there.branch_id, position=places.there[opening])
            .values_list("pk", "turn")
            .first()
        )
        if found is not None:
            copy.turn_item, copy.turn = found
    return copy
