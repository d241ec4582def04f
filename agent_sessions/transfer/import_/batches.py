"""The transactions of an import, each of many sessions or of a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction

from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.models import AgentSession, Branch
from agent_sessions.transfer.import_.records import PAGE_BYTES

if TYPE_CHECKING:
    from agent_sessions.transfer.import_.target import Target


class Batches(ExitStack):
    """Transactions that hold for about so many items, whichever sessions' they are.

    What the targets have got is written at a transaction's end, in few statements. An
    error rolls the last one back. A dry run has none.
    """

    def __init__(self, backend: DatabaseBackend, size: int, *, dry_run: bool) -> None:
        super().__init__()
        self.using = backend.using
        self.dry_run = dry_run
        # Grows with every transaction: who holds a lock sees when it is gone.
        self.number = 0
        self._statements = backend.engine.statements
        self._size = size
        self._left = 0
        self._targets: dict[int, Target] = {}
        self._items: list[tuple[Any, ...]] = []
        # Characters of these items, so that memory stays bounded.
        self._bytes = 0

    def begin(self) -> None:
        if self._left > 0 or self.dry_run:
            return
        self.number += 1
        self._left = self._size
        self.enter_context(transaction.atomic(self.using))
        self.push(lambda kind, *_: self.flush() if kind is None else None)
        # A transaction that reads before it writes loses its turn on SQLite.
        AgentSession.objects.using(self.using).filter(pk=0).update(item_count=0)

    def count(self, items: int) -> None:
        """Count what was written, and commit when it is enough."""
        self._left -= items
        if self._left <= 0:
            self.close()

    def add(self, target: Target, branch: Branch | None, rows: Sequence[Any]) -> None:
        """Write a target at the transaction's end, with new rows of a branch."""
        if not self.dry_run:
            self._targets[id(target)] = target
            self._items += ((branch, *row) for row in rows)
            self._bytes += sum(len(row[2]) for row in rows)
            if self._bytes > PAGE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what was added: sessions, branches and items, who is named first."""
        targets, self._targets = list(self._targets.values()), {}
        items, self._items, self._bytes = self._items, [], 0
        new = [target for target in targets if target.row._state.adding]
        self._insert([target.row for target in new])
        self._insert([target.changed.pop(0) for target in new if target.changed])
        for target in targets:
            target.save_branches()
        if items:
            rows = ((branch.pk, *row) for branch, *row in items)
            with connections[self.using].cursor() as cursor:
                self._statements.insert_rows(cursor, rows)
        for target in targets:
            target.save_row(is_new=target in new)
        if new:
            sessions = AgentSession.objects.using(self.using)
            sessions.bulk_update([target.row for target in new], ["branch"])

    def _insert(self, rows: Sequence[AgentSession | Branch]) -> None:
        if connections[self.using].features.can_return_rows_from_bulk_insert:
            for model in {type(row) for row in rows}:
                model._base_manager.using(self.using).bulk_create(rows)
        else:
            for row in rows:
                row.save(using=self.using)
