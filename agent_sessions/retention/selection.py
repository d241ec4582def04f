"""Which sessions are meant: one language for the commands and the admin."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.db.models import Count, Exists, Model, OuterRef, Q, QuerySet, Sum
from django.utils import timezone

from agent_sessions.backends.keys import SESSION_ID_LENGTH, check_session_id
from agent_sessions.exceptions import AgentSessionError, InvalidSessionId
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession, Branch
from agent_sessions.times import day_of

# Rows of one query.
CHUNK = 500

Rows = QuerySet[AgentSession]
M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Totals:
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
    # Only those that have a branch of more turns, as far as its row counts them.
    more_turns_than: int = 0

    @property
    def narrows(self) -> bool:
        """Return whether more is said than the backend, and what is worth a look."""
        plain = replace(self, backends=(), filled=False, more_turns_than=0)
        return plain != Selection()

    def queries(self) -> list[Rows]:
        """Return a query for each Django database. Raises InvalidBackend."""
        if self.backends:
            using = {sessions[alias].directory.using for alias in self.backends}
        else:
            using = set(databases())
        wanted = self._wanted()
        return [
            AgentSession.objects.using(name).filter(wanted) for name in sorted(using)
        ]

    def among(self, using: str, pks: Collection[int]) -> Rows:
        """Return the sessions of these keys that are selected."""
        return AgentSession.objects.using(using).filter(self._wanted(), pk__in=pks)

    def named(self) -> tuple[list[AgentSession], list[str]]:
        """Find the named sessions, in the order given, and the names of no session."""
        wanted = list(dict.fromkeys(self.session_ids))
        ids = [name for name in wanted if is_storable(name)]
        found: dict[str, list[AgentSession]] = {}
        for query in self.queries():
            rows = query.filter(session_id__in=ids).order_by("pk")
            for row in rows.select_related("user"):
                found.setdefault(row.session_id, []).append(row)
        return (
            [row for name in wanted for row in found.get(name, ())],
            [name for name in wanted if name not in found],
        )

    def rows(self) -> Iterator[AgentSession]:
        """Return the sessions; in chunks, with no cursor held between them."""
        if self.session_ids:
            yield from self.named()[0]
            return
        for query in self.queries():
            yield from chunks(query.select_related("user"))

    def totals(self) -> Totals:
        """Count the sessions and their items; those that are named by their name."""
        if self.session_ids:
            rows = self.named()[0]
            return Totals(len(rows), sum(row.item_count for row in rows))
        total, items = 0, 0
        for query in self.queries():
            found = query.aggregate(sessions=Count("pk"), items=Sum("item_count"))
            total, items = total + found["sessions"], items + (found["items"] or 0)
        return Totals(total, items)

    def _wanted(self) -> Q:
        now = timezone.now()
        wanted = Q(backend__in=self.backends) if self.backends else Q()
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
        if self.more_turns_than:
            branches = Branch._base_manager.filter(
                session_id=OuterRef("pk"), turn__gt=self.more_turns_than
            )
            wanted &= Q(Exists(branches))
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


def in_chunks(rows: QuerySet[M]) -> Iterator[list[M]]:
    """Read a query in chunks, with no cursor held between them."""
    after = 0
    while chunk := list(rows.filter(pk__gt=after).order_by("pk")[:CHUNK]):
        yield chunk
        after = chunk[-1].pk


def chunks(rows: QuerySet[M]) -> Iterator[M]:
    """Return the rows of a query; they are read as in_chunks() does."""
    return chain.from_iterable(in_chunks(rows))


def databases(*, skip_broken: bool = False) -> list[str]:
    """Name the Django databases that may have sessions.

    Rows of an alias that is configured no longer are there too, and DjangoSession
    works without any alias. Raises InvalidBackend, unless what can't be built is to be
    skipped.
    """
    errors = (AgentSessionError, ImproperlyConfigured) if skip_broken else ()
    found = set[str]()
    with suppress(*errors):
        found.add(sessions.database().directory.using)
    with suppress(*errors):
        for alias in sessions:
            with suppress(*errors):
                found.add(sessions[alias].directory.using)
    return sorted(found)


def has_retention(backends: tuple[str, ...] = ()) -> bool:
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
    try:
        return now - age
    except OverflowError:
        return datetime.min.replace(year=2, tzinfo=now.tzinfo)
