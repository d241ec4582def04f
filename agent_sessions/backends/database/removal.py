"""Remove long histories in small steps, so that no writer waits for them.

What is removed is taken out of its session in one short transaction: from then on
nobody finds it. It lies under a row of the directory that belongs to no backend until
its rows have been deleted, some at a time. Who is killed in between leaves that row
behind, and the next sweep goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, QuerySet, Sum
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.history import clear_history
from agent_sessions.backends.directory import forget_history
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.models import (
    MAIN_BRANCH,
    REMOVED,
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.signals import session_cleared

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

    pass

# Rows of one transaction.
BATCH_SIZE = 500
# SQLite has one writer at a time, and who waits looks again only now and then: it is
# left alone for this many times as long as it was held.
_REST = 4.0
# Seconds after which a transaction was a long one, and how few rows are enough then.
_LONG = 0.04
_LEAST = 50

# A history of more rows than this is cleared in steps of so many where there is only
# one writer: half of an append's usual wait, and less to write than in one transaction.
_STEP = 2_000
# Pages of SQLite's log that are written back at once meanwhile: it grows to 16 MB.
_CHECKPOINT = 4_000

Guard = Callable[[AgentSession], None]
Told = Callable[[int], None]


def remove_history(
    engine: Engine,
    key: SessionKey,
    *,
    delete: bool = False,
    guard: Guard,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Empty a session for all who read it, or delete it; tell how many items it had.

    `guard` is given the session's row once it is held, and raises where it must stay.
    Up to `batch_size` rows are deleted at once; more are left to sweep(). Raises
    SessionDoesNotExist where it is gone.
    """

    def remove(branches: Branches) -> int:
        row = branches.directory.rows(key).first()
        if row is None:
            raise SessionDoesNotExist(key.session_id)
        guard(row)
        if _is_long(engine.using, row, batch_size, delete=delete):
            count: int = row.item_count
            (_bury_session if delete else _bury_branches)(engine.using, row)
            return count
        count = clear_history(engine.using, row.pk, keep_lease=False)
        if delete:
            row.delete(using=engine.using)
        return count

    removed = engine.change(key, remove)
    _tell_cleared(engine, key, removed)
    return removed


class Clearing:
    """The removal of all items of a session, in as many steps as it needs.

    SQLite's other writers wait for one step at most. With the first the session is
    empty for all who read it; who is killed before the last one leaves the rest to
    sweep(). A run that clears its own session, and a caller who holds a transaction, do
    so in one step.
    """

    def __init__(self, engine: Engine, key: SessionKey) -> None:
        self.engine = engine
        self.key = key
        # How many items there were, once a step has found out.
        self.count = 0
        self.is_done = False
        self._grave: _Grave | None = None

    def step(self) -> None:
        """Do what is next. Raises SessionDoesNotExist, LeaseLost and StorageError."""
        if self._grave is None:
            connection = self.engine.connection
            in_steps = (
                connection.vendor == "sqlite"
                and not connection.in_atomic_block
                and self.key.fence is None
            )
            self._grave = self.engine.run(partial(self._empty, in_steps))
        elif self._grave.has_items:
            self.engine.run(self._delete, alone=True)
        else:
            # With the usual checkpoint: none of the next writers pays for it.
            self._grave.advance(self.engine, _STEP)
        self.is_done = self._grave is None or self._grave.is_done
        if self.is_done:
            _tell_cleared(self.engine, self.key, self.count)

    def _delete(self, connection: BaseDatabaseWrapper) -> None:
        if self._grave is not None:
            with _rarer_checkpoints(connection):
                self._grave.advance(self.engine, _STEP)

    def _empty(self, in_steps: bool, connection: BaseDatabaseWrapper) -> _Grave | None:
        held = self.engine.lock(connection, self.key)
        if held is None:
            return None
        using = self.engine.using
        if in_steps:
            row = AgentSession.objects.using(using).get(pk=held.pk)
            if _is_long(using, row, _STEP, delete=False):
                self.count = row.item_count
                return _Grave(using, _bury_branches(using, row), _STEP)
        keep_lease = self.key.fence is not None
        self.count = clear_history(using, held.pk, keep_lease=keep_lease)
        return None


def unswept(using: str) -> int:
    """Return how many items have been removed and are still to be deleted."""
    return int(_graves(using).aggregate(items=Sum("item_count"))["items"] or 0)


def sweep(
    engine: Engine,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Told | None = None,
) -> int:
    """Delete what has been removed from a database, in short transactions.

    Tells how many items. Several processes may sweep at once: what one of them holds
    the others leave to it.
    """
    total = 0
    graves = _graves(engine.using).order_by("pk").values_list("pk", flat=True)
    for pk in list(graves):
        grave = _Grave(engine.using, pk, batch_size)
        while not grave.is_done:
            began = time.monotonic()
            count = grave.advance(engine, batch_size)
            rest(engine.using, began)
            total += count
            if progress is not None:
                progress(count)
    return total


def rest(using: str, began: float) -> None:
    """Let other writers in after a transaction that began then, where they wait."""
    connection = connections[using]
    if connection.vendor == "sqlite" and not connection.in_atomic_block:
        time.sleep((time.monotonic() - began) * _REST)


def _tell_cleared(engine: Engine, key: SessionKey, count: int) -> None:
    session_cleared.send(
        engine.sender,
        session_id=key.session_id,
        backend=engine.alias,
        user_id=key.user_id,
        count=count,
    )


# -- taking out ------------------------------------------------------------------------


def _is_long(using: str, row: AgentSession, most: int, *, delete: bool) -> bool:
    """Return whether a session has more rows than are deleted at once."""
    branches = Branch._base_manager.using(using).filter(session_id=row.pk)
    items = SessionItem._base_manager.using(using).filter(
        branch_id__in=list(branches.values_list("pk", flat=True))
    )
    if items[: most + 1].count() > most:
        return True
    runs = AgentRun._base_manager.using(using).filter(session_id=row.pk)
    return delete and runs[: most + 1].count() > most


def _bury_session(using: str, row: AgentSession) -> None:
    """Take a whole session out of the directory; its id is free at once."""
    AgentSession.objects.using(using).filter(pk=row.pk).update(
        backend=REMOVED,
        session_id=AgentSession.new_id(),
        user=None,
        title="",
        metadata={},
        branch=None,
        state=AgentSession.State.IDLE,
        run_id="",
        fence=F("fence") + 1,
    )


def _bury_branches(using: str, row: AgentSession) -> int:
    """Put empty branches in the places of a session's; return where those are now.

    They begin where the old ones ended, so that positions are never given twice, and
    bear their names, so that no stale session writes into another's.
    """
    grave = AgentSession.objects.using(using).create(
        backend=REMOVED, session_id=AgentSession.new_id(), item_count=row.item_count
    )
    branches = Branch._base_manager.using(using)
    old = list(branches.filter(session_id=row.pk))
    branches.filter(session_id=row.pk).update(session=grave)
    # The runs stay with their session, and lead to nothing that is removed.
    runs = AgentRun._base_manager.using(using).filter(session_id=row.pk)
    runs.exclude(branch=None).update(branch=None)
    now = timezone.now()
    for branch in old:
        # The other names are made by us, from numbers that are never given twice.
        if "~" not in branch.name:
            live = branch.name == MAIN_BRANCH
            branches.create(
                session_id=row.pk,
                name=branch.name,
                head=branch.head,
                archived_at=None if live else branch.archived_at or now,
            )
    main = branches.filter(session_id=row.pk, name=MAIN_BRANCH).first()
    forget_history(using, row.pk, keep_lease=False, branch=main)
    return int(grave.pk)


# -- deleting --------------------------------------------------------------------------


@contextmanager
def _rarer_checkpoints(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Have SQLite write more of its log back at once.

    A history lies scattered where others were deleted before it was written, and what
    is written back together goes to the disk in the file's order.
    """
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA wal_autocheckpoint")
        (usual,) = cursor.fetchone()
        is_rarer = 0 < usual < _CHECKPOINT
        if is_rarer:
            cursor.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT:d}")
        try:
            yield
        finally:
            if is_rarer:
                cursor.execute(f"PRAGMA wal_autocheckpoint = {usual:d}")


def _graves(using: str) -> QuerySet[AgentSession]:
    # The default manager leaves them out.
    return AgentSession._base_manager.using(using).filter(backend=REMOVED)


class _Grave:
    """What was taken out of one session: each step deletes a part, in its order."""

    def __init__(self, using: str, pk: int, size: int) -> None:
        self.using = using
        self.pk = pk
        self.size = size
        self.is_done = False
        # Whether the last step found a row at each position: more follow in most cases.
        self._was_full = False
        # Whether every item was found and deleted, as far as the steps have seen.
        self._is_drained = False
        self.has_items = True
        self._row = _graves(using).filter(pk=pk)
        self._branches = Branch._base_manager.using(using).filter(session_id=pk)
        # Nobody gives a grave another branch.
        self._pks: list[int] | None = None
        # Where the last step ended: looking from the beginning again, PostgreSQL would
        # walk over everything that was deleted before.
        self._after: dict[int, int] = {}

    def advance(self, engine: Engine, most: int) -> int:
        """Take a step in a transaction of its own; tell how many items it deleted."""
        began = time.monotonic()
        count = engine.atomically(self._step)
        self._adapt(time.monotonic() - began, most)
        if self._is_drained:
            self._look_again()
        return count

    def _step(self) -> int:
        """Delete up to `size` rows; tell how many items were among them."""
        if not self._hold():
            self.is_done = True
            return 0
        if self._pks is None:
            branches = self._branches.order_by("pk")
            self._pks = list(branches.values_list("pk", flat=True))
        for branch in self._pks:
            if count := self._delete_items(branch):
                return count
        if self.has_items:
            self._is_drained = True
            return 0
        runs = AgentRun._base_manager.using(self.using)
        own = runs.filter(session_id=self.pk).order_by("pk")
        # The runs of a session that was only cleared stay with it.
        others = runs.filter(branch_id__in=self._pks).order_by("pk")
        if found := list(own.values_list("pk", flat=True)[: self.size]):
            runs.filter(pk__in=found).delete()
        elif found := list(others.values_list("pk", flat=True)[: self.size]):
            runs.filter(pk__in=found).update(branch=None)
        else:
            self._branches.update(parent=None)
            self._row.delete()
            self.is_done = True
        return 0

    def _adapt(self, seconds: float, most: int) -> None:
        """Choose the next step's size by how long the last one kept others waiting.

        On other databases than SQLite nobody waits for it.
        """
        if connections[self.using].vendor != "sqlite":
            return
        if seconds > _LONG:
            self.size = max(self.size // 2, min(_LEAST, most))
        elif seconds < _LONG / 4:
            self.size = min(self.size * 2, most)

    def _look_again(self) -> None:
        """Look for items from the beginning, while nothing is held.

        PostgreSQL walks over all that was deleted, as it would when the branches are
        deleted; once walked over it is passed by quickly.
        """
        items = SessionItem._base_manager.using(self.using)
        if items.filter(
            branch_id__in=list(self._branches.values_list("pk", flat=True))
        ).exists():
            self._after.clear()
        else:
            self.has_items = False
        self._is_drained = False

    def _hold(self) -> bool:
        """Hold the row; False where another process does, or it is gone."""
        connection = connections[self.using]
        if not connection.features.has_select_for_update:
            # A transaction that reads first may be refused its turn to write.
            return bool(self._row.update(item_count=F("item_count")))
        skip = connection.features.has_select_for_update_skip_locked
        return self._row.select_for_update(skip_locked=skip).first() is not None

    def _delete_items(self, branch: int) -> int:
        items = SessionItem._base_manager.using(self.using).filter(branch_id=branch)
        after = self._after.get(branch, -1)
        count = self._delete_after(items, branch, after) if self._was_full else 0
        if not count:
            rows = items.filter(position__gt=after).order_by("position")
            first = rows.values_list("position", flat=True).first()
            if first is None:
                return 0
            count = self._delete_after(items, branch, first - 1)
        counted = self._row.filter(item_count__gte=count)
        counted.update(item_count=F("item_count") - count)
        return count

    def _delete_after(
        self, items: QuerySet[SessionItem], branch: int, after: int
    ) -> int:
        """Delete what lies at the next `size` positions; fewer rows where some went."""
        upto = self._after[branch] = after + self.size
        count, _ = items.filter(position__gt=after, position__lte=upto).delete()
        self._was_full = count == self.size
        return count
