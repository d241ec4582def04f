"""Where a session's items lie in a copy of it, and what its runs are there."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections, transaction

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.directory import Directory
from agent_sessions.backends.reading import place_of
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.times import aware, stored
from agent_sessions.transfer.export import RUN_COLUMNS, ended

# The key of a copy's metadata: of which backend it is, and what was counted then.
MARKER = "copied_from"
# A session counts for as many items at least.
_LEAST = 10


def mark_of(row: AgentSession | None) -> dict[str, Any]:
    """Return what a copy's row says of where it comes from; {} for any other."""
    metadata = {} if row is None else row.metadata
    found = metadata.get(MARKER) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Chosen:
    """A history to copy; without a row it is one of a store that nobody owns."""

    key: SessionKey
    row: AgentSession | None = None


def together(chosen: Iterable[Chosen | str], most: int) -> Iterator[list[Chosen | str]]:
    """Return histories whose rows are read together: of up to so many items."""
    group, size = list[Chosen | str](), 0
    for each in chosen:
        row = None if isinstance(each, str) else each.row
        own = max(row.item_count if row else 0, _LEAST)
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append(each)
        size += own
    if group:
        yield group


class Known:
    """What rows tell of sessions and of their copies, as they are now."""

    def __init__(self, using: str, target: Directory, chosen: Sequence[Chosen]) -> None:
        pks = [each.row.pk for each in chosen if each.row is not None]
        self._rows = AgentSession.objects.using(using).in_bulk(pks)
        copies = AgentSession.objects.using(target.using).filter(
            backend=target.alias,
            session_id__in=[each.key.session_id for each in chosen],
        )
        self.copies = {SessionKey(row.session_id, row.user_id): row for row in copies}
        self.runs: defaultdict[int, list[AgentRun]] = defaultdict(list)
        runs = AgentRun._base_manager.using(using).filter(session_id__in=pks)
        for run in runs.order_by("pk").defer("state"):
            self.runs[run.session_id].append(run)
        # Those with items on other branches than the current one.
        branches = Branch._base_manager.using(using)
        filled = branches.filter(session_id__in=[*self._rows], head__gt=0)
        self.forked = {
            session
            for pk, session in filled.values_list("pk", "session_id")
            if pk != self._rows[session].branch_id
        }

    def row(self, chosen: Chosen) -> AgentSession | None:
        """Return a session's row. Raise AgentSession.DoesNotExist if it is gone."""
        if chosen.row is not None and chosen.row.pk not in self._rows:
            raise AgentSession.DoesNotExist
        return self._rows[chosen.row.pk] if chosen.row is not None else None


class Pairs:
    """Where items lie in the source and in the target, learnt as they are compared.

    Each gets the time at which it was written first, where the target is a copy that
    lies in a Django database.
    """

    def __init__(
        self,
        target: BaseSessionBackend,
        copy: AgentSession | None,
        runs: Sequence[AgentRun],
    ) -> None:
        self.here = array("q")
        self.there = array("q")
        # Place and time in the target of what a run has given an id.
        self.named: dict[tuple[int, str], tuple[int, str]] = {}
        self._names = {(at, when) for run in runs for at, _, when, _ in run.message_ids}
        self._in_database = target.in_database is not None
        self._keeps_times = self._in_database and bool(mark_of(copy))
        self.copy = copy
        self._late: list[tuple[datetime, int]] = []

    def add(self, here: StoredItem, there: StoredItem) -> None:
        self.here.append(here.position)
        self.there.append(there.position)
        if self._names and (name := place_of(here)) in self._names:
            moment = name[1] if self._in_database else ""
            self.named[name] = there.position, moment or place_of(there)[1]
        if self._keeps_times and here.is_timed:
            when = aware(here.created_at)
            if when != aware(there.created_at):
                self._late.append((stored(when), there.position))

    def write_times(self) -> None:
        if not self._late or self.copy is None:
            return
        connection = connections[self.copy._state.db or DEFAULT_DB_ALIAS]
        table = connection.ops.quote_name(SessionItem._meta.db_table)
        adapt, branch = connection.ops.adapt_datetimefield_value, self.copy.branch_id
        with transaction.atomic(connection.alias), connection.cursor() as cursor:
            cursor.executemany(
                f"UPDATE {table} SET created_at = %s "  # noqa: S608 - of the model
                "WHERE branch_id = %s AND position = %s",
                [(adapt(when), branch, position) for when, position in self._late],
            )

    def span(self, run: AgentRun) -> Sequence[int] | None:
        """Return where a run's first and last item lie there, None if they are gone."""
        if run.first_position is None or run.last_position is None:
            return None
        first = bisect_left(self.here, run.first_position)
        last = bisect_right(self.here, run.last_position) - 1
        return (self.there[first], self.there[last]) if first <= last else None

    def copied(self, run: AgentRun, there: AgentSession) -> AgentRun:
        """Return a run as it is of the copy."""
        columns = {name: getattr(run, name) for name in RUN_COLUMNS}
        columns["status"] = ended(run.status)
        columns["message_ids"] = [
            [place[0], name, place[1], agent]
            for at, name, when, agent in run.message_ids
            if (place := self.named.get((at, when)))
        ]
        copy = AgentRun(
            session_id=there.pk,
            branch_id=there.branch_id,
            run_id=run.run_id,
            started_at=run.started_at,
            finished_at=run.finished_at,
            **columns,
        )
        span = self.span(run)
        copy.first_position, copy.last_position = span or (None, None)
        if span is None:
            return copy
        copy.turn = run.turn
        if self._in_database:
            items = SessionItem._base_manager.using(there._state.db)
            rows = items.filter(branch_id=there.branch_id)
            # A resumed run begins after its message, any other one with it.
            openings = rows.filter(**OPENING).values_list("pk", "turn")
            before = openings.filter(position__lte=span[0]).order_by("-position")
            within = openings.filter(position__lte=span[1]).order_by("position")
            if found := before.first() or within.first():
                copy.turn_item, copy.turn = found
        return copy
