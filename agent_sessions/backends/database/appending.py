"""Appends of several sessions in one transaction, where that is worth the while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.statements import AnyBatch, Statements
from agent_sessions.concurrency.batching import for_each
from agent_sessions.exceptions import InvalidItem, StorageError
from agent_sessions.items import Item

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine


@dataclass(slots=True)
class Append:
    """What add_items() was given, and for which session; `batch` once it is encoded."""

    key: SessionKey
    items: Sequence[Item]
    batch: AnyBatch | None = None

    def encoded(self, statements: Statements) -> AnyBatch:
        """Return a value that a database takes. Raises InvalidItem."""
        if self.batch is None:
            self.batch = statements.batch(self.items)
        return self.batch


# A transaction begins with no batch that makes it longer than this many items: other
# processes wait for it.
_LONG = 200


def append_batch(engine: Engine, key: SessionKey, batch: AnyBatch) -> None:
    """Store a batch that is encoded. Raises StorageError and what a key can raise."""
    try:
        _append_batch(engine, key, batch)
    except (StorageError, UnicodeEncodeError) as exc:
        narrowed = engine.statements.narrowed(engine.connection, batch, exc)
        if narrowed is None:
            raise
        _append_batch(engine, key, narrowed)


def _append_batch(engine: Engine, key: SessionKey, batch: AnyBatch) -> None:
    statements = engine.statements
    alone = statements.appends_alone(engine.connection, batch)

    def write(connection: BaseDatabaseWrapper) -> bool:
        return statements.append(connection, key, batch, timezone.now())

    def begin(connection: BaseDatabaseWrapper) -> bool:
        engine.directory.create(key)
        return write(connection)

    while not (engine.run(write, alone=alone) or engine.run(begin)):
        pass


def append_together(
    engine: Engine, appends: Sequence[Append]
) -> list[BaseException | None]:
    """Store batches in their order, several in one transaction; give what went wrong.

    Each is stored or fails by itself: one that finds no place in a common transaction,
    or spoils it, gets its own.
    """
    connection = engine.connection
    errors: list[BaseException | None] = []
    for group in _groups(appends):
        try:
            stored = _stored(engine, connection, group)
        except StorageError as exc:
            # It couldn't begin or end: alone each of them would have to wait as long.
            errors += for_each(exc, len(group))
            continue
        for append, is_stored in zip(group, stored, strict=True):
            errors.append(None if is_stored else _error(engine, append))
    return errors


def _groups(appends: Sequence[Append]) -> Iterator[list[Append]]:
    group: list[Append] = []
    size = 0
    if len(appends) == 1:
        yield list(appends)
        return
    for append in appends:
        size += len(append.items)
        if group and size > _LONG:
            yield group
            group, size = [], len(append.items)
        group.append(append)
    yield group


def _stored(
    engine: Engine,
    connection: BaseDatabaseWrapper,
    appends: Sequence[Append],
) -> list[bool]:
    """Store what can be stored in one transaction; tell what that is."""
    statements = engine.statements
    calls = []
    try:
        for append in appends:
            batch = append.encoded(statements)
            if not statements.appends_alone(connection, batch):
                return [False] * len(appends)
            calls.append((append.key, batch))
        return statements.append_all(connection, calls)
    except InvalidItem:
        return [False] * len(appends)
    except (DatabaseError, InterfaceError) as exc:
        raise engine.storage_error(exc) from None


def _error(engine: Engine, append: Append) -> BaseException | None:
    """Store a batch by itself; give what went wrong."""
    statements = engine.statements
    try:
        append_batch(engine, append.key, append.encoded(statements))
    except Exception as exc:
        return exc
    return None
