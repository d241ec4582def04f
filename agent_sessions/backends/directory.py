"""The rows that say which sessions there are and whose they are."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from django.db import router
from django.db.models import Case, F, OuterRef, QuerySet, Subquery, Value, When
from django.db.models.functions import Greatest
from django.dispatch import Signal
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.concurrency.connections import chosen_database, transact
from agent_sessions.exceptions import BranchDoesNotExist, LeaseLost, SessionDoesNotExist
from agent_sessions.items.text import UNSEEN
from agent_sessions.models import MAIN_BRANCH, AgentRun, AgentSession, Branch
from agent_sessions.signals import announce, session_created
from agent_sessions.times import day_of

# The columns of a session in which no run is going on.
NO_RUN: dict[str, Any] = {
    "run_id": "",
    "run_owner": "",
    "run_seen_at": None,
    "run_stop": "",
    "run_listened_at": None,
    "state": AgentSession.State.IDLE,
}


def active(now: datetime) -> dict[str, Any]:
    """Return the columns that say when a session was last used."""
    return {"updated_at": now, "active_on": day_of(now)}


def database_for(option: str | None) -> str:
    """Return the alias of DATABASES that holds a backend's rows.

    Without the option `database` the router is asked, in the caller. A thread that
    works for the caller gets the same answer and doesn't ask again.
    """
    return option or chosen_database.get() or router.db_for_write(AgentSession)


class Seen(NamedTuple):
    """What a session's row said when it was looked at."""

    item_count: int
    updated_at: datetime
    fence: int


class Directory:
    """One backend alias's rows in one database; every look-up names the owner."""

    def __init__(self, alias: str, using: str) -> None:
        self.alias = alias
        self.using = using

    def rows(self, key: SessionKey) -> QuerySet[AgentSession]:
        """Return the key's own session, as a query set of at most one row."""
        return self._any_owner(key).filter(user_id=key.user_id)

    def pk_of(self, key: SessionKey) -> Subquery:
        """Return the key of the key's own session, for a filter of other rows.

        With IN instead of = PostgreSQL may join all rows to it.
        """
        return Subquery(self.rows(key).values("pk")[:1])

    def branches(self, key: SessionKey) -> QuerySet[Branch]:
        """Return the branch that a key means, as a query set of at most one row."""
        branches = Branch._base_manager.using(self.using)
        if key.branch is None:
            return branches.filter(pk=Subquery(self.rows(key).values("branch_id")[:1]))
        return branches.filter(
            session_id=self.pk_of(key), name=key.branch, version=0, archived_at=None
        )

    def assert_own(self, key: SessionKey) -> None:
        """Check that the key's session is its own, or not there at all.

        Raises SessionDoesNotExist for someone else's and BranchDoesNotExist.
        """
        row = self._any_owner(key).values_list("user_id").first()
        if row is not None and row[0] != key.user_id:
            raise SessionDoesNotExist(key.session_id)
        if key.branch not in {None, MAIN_BRANCH} and not self.branches(key).exists():
            raise BranchDoesNotExist(key.session_id, str(key.branch))

    def assert_lease(self, key: SessionKey) -> None:
        """Raise LeaseLost unless the key's lease is the last one."""
        fence = self.rows(key).values_list("fence", flat=True).first()
        if fence != key.fence:
            raise LeaseLost

    def create(self, key: SessionKey) -> None:
        """Make the rows that a session's first write needs.

        Raises SessionDoesNotExist, BranchDoesNotExist, and LeaseLost for a run: its
        session was there when it began, so it has been deleted or taken over.
        """
        if key.fence is not None:
            raise LeaseLost
        self.assert_own(key)
        sessions = AgentSession.objects.using(self.using)
        session, created = sessions.get_or_create(
            backend=self.alias,
            session_id=key.session_id,
            defaults={"user_id": key.user_id},
        )
        if session.user_id != key.user_id:
            raise SessionDoesNotExist(key.session_id)
        branch, _ = Branch._base_manager.using(self.using).get_or_create(
            session=session, name=MAIN_BRANCH, version=0
        )
        sessions.filter(pk=session.pk, branch=None).update(branch=branch)
        if created:
            self.announce(session_created, AgentSession, key)

    def ensure(self, key: SessionKey) -> None:
        """Check that the key's session is its own; make its row if it has none.

        Raises SessionDoesNotExist for someone else's.
        """

        def make() -> None:
            if not self.rows(key).exists():
                self.create(key)

        transact(self.using, make)

    def touch(
        self,
        key: SessionKey,
        *,
        count: int | None = None,
        added: int = 0,
        title: str = "",
    ) -> bool:
        """Write down that a session was used, and how many items it has.

        Without `count` those that were `added` are added up, or taken off. The title
        is the first one that shows words. Return whether the row is there.
        """
        columns = active(timezone.now())
        if count is not None:
            columns["item_count"] = count
        elif added:
            # Never below 0: a process may have been killed before it added its own.
            columns["item_count"] = Greatest(F("item_count"), -added) + added
        if title:
            field = AgentSession._meta.get_field("title")
            untitled = When(
                title__in=["", UNSEEN], then=Value(title, output_field=field)
            )
            columns["title"] = Case(untitled, default=F("title"))
        return bool(self.rows(key).update(**columns))

    def look(self, key: SessionKey) -> Seen | None:
        """Return what the row of the key's own session says; None where it has none."""
        row = self.rows(key).values_list(*Seen._fields).first()
        return None if row is None else Seen(*row)

    def recount(self, key: SessionKey, seen: Seen, count: int) -> None:
        """Write how many items a session has, unless its row has changed meanwhile."""
        self.rows(key).filter(**seen._asdict()).update(item_count=count)

    def revoke(self, key: SessionKey) -> None:
        """Take the lease from the run that is going on, if one is."""
        self.rows(key).exclude(run_id="").update(fence=F("fence") + 1, **NO_RUN)

    def cleared(self, key: SessionKey) -> None:
        """Write down that a session has no items any more."""

        def reset() -> None:
            session = self.rows(key).values_list("pk", flat=True).first()
            if session is not None:
                is_own = key.fence is not None
                forget_histories(self.using, [session], keep_lease=is_own)

        transact(self.using, reset)

    def announce(
        self, signal: Signal, sender: type, key: SessionKey, **more: Any
    ) -> None:
        """Send a signal about a session, once what was written is committed."""
        announce(
            signal,
            sender,
            self.using,
            session_id=key.session_id,
            backend=self.alias,
            user_id=key.user_id,
            **more,
        )

    def _any_owner(self, key: SessionKey) -> QuerySet[AgentSession]:
        rows: Any = AgentSession.objects.using(self.using)
        return rows.filter(backend=self.alias, session_id=key.session_id)  # type: ignore[no-any-return]


def forget_histories(using: str, sessions: list[int], *, keep_lease: bool) -> None:
    """Reset what sessions' rows tell of their items, and withdraw open approvals.

    What runs have told goes too.

    They go on with their main branch. A run that is going on loses its lease, unless it
    is the one that clears: else its late writes would bring back a part of what was
    cleared.
    """
    now = timezone.now()
    runs = AgentRun._base_manager.using(using).filter(session_id__in=sessions)
    waiting = runs.filter(status=run_rows.Status.WAITING)
    run_rows.end(waiting, run_rows.Status.CANCELLED)
    run_rows.remove_events_of(using, sessions)
    columns: dict[str, Any] = {}
    if not keep_lease:
        columns = {"fence": F("fence") + 1, **NO_RUN}
    main = Branch._base_manager.filter(
        session_id=OuterRef("pk"), name=MAIN_BRANCH, version=0
    )
    AgentSession.objects.using(using).filter(pk__in=sessions).update(
        item_count=0,
        title="",
        branch=Subquery(main.values("pk")[:1]),
        **active(now),
        **columns,
    )
