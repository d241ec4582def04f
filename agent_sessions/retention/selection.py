"""Which sessions are meant: one language for the commands and the admin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Q, QuerySet, Sum
from django.utils import timezone

from agent_sessions.backends.arguments import SESSION_ID_LENGTH, check_session_id
from agent_sessions.exceptions import InvalidSessionId
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession
from agent_sessions.times import day_of

# Rows and ids of one query.
CHUNK = 500

Rows = QuerySet[AgentSession]


@dataclass(frozen=True, slots=True)
class Totals:
    """How many sessions there are, with how many items."""

    sessions: int = 0
    items: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """Sessions by id, backend, owner, state and age; what is given narrows it down.

    `user` owns them, `unowned` ones have no owner. `older_than` is the time since the
    last activity. `idle` means idle for longer than the `max_idle` of their backend;
    `expired` means that their time is over or that they are older than the `max_age`
    of their backend; with both, one of them is enough.
    """

    session_ids: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    user: Any = None
    unowned: bool = False
    older_than: timedelta | None = None
    idle: bool = False
    expired: bool = False
    state: str = ""
    # Without those that are known to be empty.
    filled: bool = False

    @property
    def narrows(self) -> bool:
        """Return whether more is said than the backend and that it isn't empty."""
        return bool(
            self.session_ids
            or self.user is not None
            or self.unowned
            or self.older_than is not None
            or self.idle
            or self.expired
            or self.state
        )

    def queries(self, now: datetime | None = None) -> list[Rows]:
        """Return a query for each Django database. Raises InvalidBackend."""
        now = now or timezone.now()
        wanted = self._wanted(now)
        return [
            AgentSession.objects.using(using).filter(aliases & wanted)
            for using, aliases in sorted(self._places().items())
        ]

    def named(self) -> tuple[list[AgentSession], list[str]]:
        """Find the named sessions, in the order given, and the names of no session."""
        wanted = list(dict.fromkeys(self.session_ids))
        storable = [name for name in wanted if is_storable(name)]
        found: dict[str, list[AgentSession]] = {}
        for query in self.queries():
            for start in range(0, len(storable), CHUNK):
                ids = storable[start : start + CHUNK]
                named = query.filter(session_id__in=ids).order_by("pk")
                for row in named.select_related("user"):
                    found.setdefault(row.session_id, []).append(row)
        rows = [row for name in wanted for row in found.get(name, ())]
        return rows, [name for name in wanted if name not in found]

    def rows(self) -> Iterator[AgentSession]:
        """Return the sessions; in chunks, with no cursor held between them."""
        if self.session_ids:
            yield from self.named()[0]
            return
        for query in self.queries():
            after = 0
            while True:
                later = query.filter(pk__gt=after).order_by("pk")
                chunk = list(later.select_related("user")[:CHUNK])
                yield from chunk
                if len(chunk) < CHUNK:
                    break
                after = chunk[-1].pk

    def totals(self) -> Totals:
        """Count the sessions and their items; those that are named by their name."""
        if self.session_ids:
            rows = self.named()[0]
            return Totals(len(rows), sum(row.item_count for row in rows))
        totals = Totals()
        for query in self.queries():
            found = query.aggregate(sessions=Count("pk"), items=Sum("item_count"))
            totals = Totals(
                totals.sessions + found["sessions"],
                totals.items + (found["items"] or 0),
            )
        return totals

    def holds(self, row: AgentSession) -> bool:
        """Return whether a session is still selected, as its database has it now."""
        return any(
            query.filter(pk=row.pk).exists()
            for query in self.queries()
            if query.db == row._state.db
        )

    def _places(self) -> dict[str, Q]:
        """Return the rows that are looked at, by database."""
        if not self.backends:
            # Rows of an alias that is no longer configured are there too, and
            # DjangoSession works without any alias.
            found = [sessions.database(), *(sessions[alias] for alias in sessions)]
            return {each.directory.using: Q() for each in found}
        places: dict[str, Q] = {}
        for alias in self.backends:
            using = sessions[alias].directory.using
            places[using] = places.get(using, Q()) | Q(backend=alias)
        return places

    def _wanted(self, now: datetime) -> Q:
        wanted = Q()
        if self.user is not None:
            wanted &= Q(user_id=self.user.pk)
        if self.unowned:
            wanted &= Q(user_id=None)
        if self.state:
            wanted &= Q(state=self.state)
        if self.older_than is not None:
            wanted &= _inactive(_before(now, self.older_than))
        if self.filled:
            # Other stores may not tell the directory how many items there are.
            counting = [a for a in sessions if sessions[a].in_database]
            wanted &= ~Q(item_count=0, backend__in=counting)
        if self.idle or self.expired:
            wanted &= self._over(now)
        return wanted

    def _over(self, now: datetime) -> Q:
        found = Q(expires_at__lte=now) if self.expired else Q(pk__in=())
        for alias in self.backends or sessions:
            retention = sessions[alias].retention
            if self.idle and retention.max_idle is not None:
                since = _before(now, retention.max_idle)
                found |= Q(backend=alias) & _inactive(since)
            if self.expired and retention.max_age is not None:
                since = _before(now, retention.max_age)
                found |= Q(backend=alias, created_at__lt=since)
        return found


def has_retention(backends: tuple[str, ...] = ()) -> bool:
    """Return whether a backend has `max_idle` or `max_age`. Raises InvalidBackend."""
    return any(sessions[alias].retention for alias in backends or sessions)


def is_storable(session_id: str) -> bool:
    """Return whether an id is possible; databases refuse to look for others."""
    try:
        check_session_id(session_id)
    except InvalidSessionId:
        return False
    return len(session_id) <= SESSION_ID_LENGTH


def _inactive(since: datetime) -> Q:
    # The day has an index, the time hasn't: every append would have to move it.
    return Q(active_on__lte=day_of(since), updated_at__lt=since)


def _before(now: datetime, age: timedelta) -> datetime:
    """Go back in time, at most to its beginning."""
    try:
        return now - age
    except OverflowError:
        return datetime.min.replace(year=2, tzinfo=now.tzinfo)
