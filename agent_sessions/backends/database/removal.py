"""Remove histories in short transactions, so that no writer waits for them.

A short history is deleted at once. A long one moves to a row of the directory that has
`removed_at`: from then on nobody finds it. Its rows are deleted some at a time, and the
next finish() goes on where a process was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Count, F, QuerySet, Sum
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.pace import REST, Pace
from agent_sessions.backends.directory import forget_histories
from agent_sessions.managers import removed
from agent_sessions.models import (
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.signals import session_cleared

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# Rows of one transaction.
BATCH_SIZE = 500
# To remove a session takes about as long as so many rows.
_SESSION = 10
# The rows of a longer history than this go apart, on branches that nobody reads: while
# an old transaction lives, PostgreSQL walks over each deleted row of a branch again.
_SHORT = 500
# A long one is cleared in steps of so many rows: half of an append's usual wait on
# SQLite, and less to write than in one transaction.
_STEP = 2_000

Guard = Callable[[AgentSession], None]


def take_out(
    engine: Engine,
    rows: QuerySet[AgentSession],
    may_go: Callable[[AgentSession], bool],
    *,
    delete: bool,
    pace: Pace,
) -> None:
    """Empty sessions for all who read them, or delete them, in one transaction.

    `may_go` is asked of each once it is held. Of what has more rows than go into a
    transaction the rest is left to finish().
    """

    def take(connection: BaseDatabaseWrapper) -> list[AgentSession]:
        held = [row for row in _hold(engine.using, rows) if may_go(row)]
        _remove(engine.using, held, delete=delete, most=pace.size)
        return held

    for row in engine.run(pace.timed(take)):
        _tell_cleared(engine, SessionKey(row.session_id, row.user_id), row.item_count)


class Clearing:
    """The removal of all items of a session, in as many steps as it needs.

    Other writers wait for one step at most. With the first the session is empty for
    all who read it; who is killed before the last one leaves the rest to finish(). A
    run that clears its own session does so in one step. A caller's transaction holds
    all steps.
    """

    def __init__(self, engine: Engine, key: SessionKey) -> None:
        self.engine = engine
        self.key = key
        # How many items there were, once a step has found out.
        self.count = 0
        self.is_done = False
        self._removed: _RemovedHistory | None = None

    def step(self) -> None:
        """Do what is next. Raises SessionDoesNotExist, LeaseLost and StorageError."""
        if self._removed is None:
            self.is_done = True
            for pk in self.engine.run(self._begin):
                pace = Pace(self.engine.using, _STEP)
                self._removed = _RemovedHistory(self.engine, pk, pace)
                self.is_done = False
        else:
            self._removed.step(rest=0)
            self.is_done = self._removed.is_done
        if self.is_done:
            _tell_cleared(self.engine, self.key, self.count)

    def _begin(self, connection: BaseDatabaseWrapper) -> list[int]:
        held = self.engine.lock(connection, self.key)
        if held is None:
            return []
        rows = AgentSession.objects.using(self.engine.using)
        row = rows.get(pk=held.pk)
        self.count = row.item_count
        is_run = self.key.fence is not None
        return _remove(
            self.engine.using,
            [row],
            # A run's row tells where its items lie.
            most=self.count if is_run else _SHORT,
            keep_lease=is_run,
        )


def count_removed(using: str) -> int:
    """Return how many items have been removed and are still to be deleted."""
    return int(_removed(using).aggregate(items=Sum("item_count"))["items"] or 0)


def finish(
    engine: Engine,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
    until: float = float("inf"),
) -> int:
    """Delete what has been removed from a database, in short transactions.

    Return how many items. Several processes may do so at once: what one of them holds
    the others leave to it. What is left at `until` waits for a later call.
    """
    total = 0
    pace = Pace(engine.using, batch_size)
    for batch in batches(_removed(engine.using).order_by("pk"), pace):
        if time.monotonic() >= until:
            break
        pks = [row.pk for row in batch]
        if len(batch) > 1:
            count, pks = engine.run(
                pace.timed(partial(_delete_short, engine.using, pks, pace.size))
            )
            pace.rest()
            total += count
            if progress is not None:
                progress(count)
        for pk in pks:
            history = _RemovedHistory(engine, pk, pace)
            while not history.is_done and time.monotonic() < until:
                count = history.step()
                total += count
                if progress is not None:
                    progress(count)
    return total


def batches(rows: Iterable[AgentSession], pace: Pace) -> Iterator[list[AgentSession]]:
    """Return sessions that are removed in one transaction."""
    batch, size = list[AgentSession](), 0
    for row in rows:
        own = max(row.item_count, _SESSION)
        if batch and size + own > pace.size:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += own
    if batch:
        yield batch


def _tell_cleared(engine: Engine, key: SessionKey, count: int) -> None:
    engine.directory.announce(session_cleared, engine.sender, key, count=count)


def _hold(
    using: str, rows: QuerySet[AgentSession], *, skip_locked: bool = False
) -> list[AgentSession]:
    features = connections[using].features
    if features.has_select_for_update:
        skip = skip_locked and features.has_select_for_update_skip_locked
        return list(rows.order_by("pk").select_for_update(skip_locked=skip))
    # A transaction that reads first may be refused its turn to write.
    rows.update(fence=F("fence"))
    return list(rows.order_by("pk"))


# -- taking out ------------------------------------------------------------------------


def _remove(
    using: str,
    rows: list[AgentSession],
    *,
    most: int,
    delete: bool = False,
    keep_lease: bool = False,
) -> list[int]:
    """Remove the histories of sessions whose rows are held.

    Return the keys of the rows under which lie those that are still to be deleted.
    """
    pks = [row.pk for row in rows]
    busy = _with_many_runs(using, pks, most) if delete else set[int]()
    long = [row for row in rows if row.pk in busy or row.item_count > most]
    left = [(_detach if delete else _detach_branches)(using, row) for row in long]
    short = [row.pk for row in rows if row not in long]
    branches = Branch._base_manager.using(using).filter(session_id__in=short)
    items = SessionItem._base_manager.using(using).filter(
        branch_id__in=list(branches.values_list("pk", flat=True))
    )
    items.delete()
    if delete:
        AgentSession.objects.using(using).filter(pk__in=short).delete()
        return left
    # Branches' heads stay, so positions are never given twice, and so do their names:
    # a stale session can't write into another's.
    main = {"name": MAIN_BRANCH, "version": 0}
    branches.exclude(**main).update(archived_at=timezone.now())
    branches.filter(**main).update(turn=0)
    forget_histories(using, pks, keep_lease=keep_lease)
    return left


def _with_many_runs(using: str, pks: list[int], most: int) -> set[int]:
    """Return the sessions without which the others have up to `most` runs."""
    runs = AgentRun._base_manager.using(using).filter(session_id__in=pks)
    if runs[: most + 1].count() <= most:
        return set()
    counts = runs.order_by().values_list("session_id").annotate(count=Count("pk"))
    return {pk for pk, count in counts if count > most / len(pks)}


def _detach(using: str, row: AgentSession) -> int:
    """Take a whole session out of the directory; its id is free at once."""
    AgentSession.objects.using(using).filter(pk=row.pk).update(
        removed_at=timezone.now(),
        session_id=AgentSession.new_id(),
        user=None,
        title="",
        metadata={},
        branch=None,
        state=AgentSession.State.IDLE,
        run_id="",
        fence=F("fence") + 1,
    )
    return int(row.pk)


def _detach_branches(using: str, row: AgentSession) -> int:
    """Put empty branches in the places of a session's; return where those are now.

    They begin where the old ones ended, so that positions are never given twice, and
    bear their names, so that no stale session writes into another's.
    """
    removed = AgentSession.objects.using(using).create(
        backend=row.backend,
        session_id=AgentSession.new_id(),
        removed_at=timezone.now(),
        item_count=row.item_count,
    )
    branches = Branch._base_manager.using(using)
    old = list(branches.filter(session_id=row.pk, version=0))
    branches.filter(session_id=row.pk).update(session=removed)
    # The runs stay with their session, and lead to nothing that is removed.
    runs = AgentRun._base_manager.using(using).filter(session_id=row.pk)
    runs.exclude(branch=None).update(branch=None)
    now = timezone.now()
    branches.bulk_create(
        Branch(
            session_id=row.pk,
            name=branch.name,
            head=branch.head,
            archived_at=None if branch.name == MAIN_BRANCH else now,
        )
        for branch in old
    )
    return int(removed.pk)


# -- deleting --------------------------------------------------------------------------


def _removed(using: str) -> QuerySet[AgentSession]:
    # The default manager leaves them out.
    return AgentSession._base_manager.using(using).filter(removed())


def _delete_short(
    using: str, pks: list[int], most: int, connection: BaseDatabaseWrapper
) -> tuple[int, list[int]]:
    """Delete removed sessions of few rows; return how many items, and which are left."""
    rows = _hold(using, _removed(using).filter(pk__in=pks), skip_locked=True)
    pks = [row.pk for row in rows]
    left = _with_many_runs(using, pks, most)
    pks = [pk for pk in pks if pk not in left]
    branches = Branch._base_manager.using(using).filter(session_id__in=pks)
    items = SessionItem._base_manager.using(using).filter(
        branch_id__in=list(branches.values_list("pk", flat=True))
    )
    count = items.delete()[0]
    AgentSession._base_manager.using(using).filter(pk__in=pks).delete()
    return count, sorted(left)


class _RemovedHistory:
    """What was taken out of one session: each step deletes a part, in its order."""

    def __init__(self, engine: Engine, pk: int, pace: Pace) -> None:
        self.engine = engine
        self.using = engine.using
        self.pace = pace
        self._row = _removed(self.using).filter(pk=pk)
        self._runs = AgentRun._base_manager.using(self.using).filter(session_id=pk)
        self._branches = Branch._base_manager.using(self.using).filter(session_id=pk)
        # Branches that may have items; None at the end. And where the last step ended:
        # looking from the beginning again, PostgreSQL would walk over all it deleted.
        self._left: list[int] | None = list(self._branches.values_list("pk", flat=True))
        self._after = -1

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left, or another process deletes it."""
        return self._left is None

    def step(self, rest: float = REST) -> int:
        """Take a step in a transaction of its own; return how many items it deleted."""
        count, self._left, self._after = self.engine.run(self.pace.timed(self._delete))
        self.pace.rest(rest)
        return count

    def _delete(
        self, connection: BaseDatabaseWrapper
    ) -> tuple[int, list[int] | None, int]:
        """Delete some rows; return how many are items, and what is next."""
        if not _hold(self.using, self._row, skip_locked=True):
            return 0, None, -1
        left, after = self._left, self._after
        while left:
            items = SessionItem._base_manager.using(self.using).filter(
                branch_id=left[0], position__gt=after
            )
            positions = items.order_by("position").values_list("position", flat=True)
            if (first := positions.first()) is None:
                left, after = left[1:], -1
                continue
            upto = first - 1 + self.pace.size
            count = items.filter(position__lte=upto).delete()[0]
            counted = self._row.filter(item_count__gte=count)
            counted.update(item_count=F("item_count") - count)
            return count, left, upto
        runs = self._runs.filter(pk__gt=after).order_by("pk")
        if found := list(runs.values_list("pk", flat=True)[: self.pace.size]):
            self._runs.filter(pk__in=found).delete()
            return 0, left, found[-1]
        self._branches.update(parent=None)
        self._row.delete()
        return 0, None, -1
