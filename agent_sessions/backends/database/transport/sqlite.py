"""SQLite: short reads by the event loop itself, and appends that share a commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.database.history import MANY, Reading, append_batch
from agent_sessions.backends.database.sql.base import AnyBatch, Statements
from agent_sessions.backends.database.sql.sqlite import is_watched, with_question_marks
from agent_sessions.backends.keys import SessionKey
from agent_sessions.concurrency.batching import Gathering, for_each
from agent_sessions.exceptions import InvalidItem, StorageError
from agent_sessions.items import Item

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# What the event loop reads at most, in rows and in characters: it has others to serve,
# though a thread that decodes as much holds it up as well.
ROWS = 100
CHARACTERS = 250_000
# So many rows are read at a time.
_SOME = 50
# A transaction begins with no batch that makes it longer than this many items: other
# processes wait for it.
_LONG = 200


class SQLiteTransport:
    """Reads in the loop, on the connection of a thread that has rest, and shared commits.

    It takes less time to read a few rows than to wake a thread and be woken by it. Only
    under WAL, where a read waits for no writer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gathering = Gathering(partial(append_together, engine))
        # Whether a connection, as it was opened, has WAL.
        self._modes: WeakKeyDictionary[
            BaseDatabaseWrapper, tuple[sqlite3.Connection, bool]
        ] = WeakKeyDictionary()

    async def append(self, key: SessionKey, items: Sequence[Item]) -> bool:
        """Store a batch with the others that wait for the thread. Return True."""
        append = Append(key, items)
        if len(items) <= MANY:
            # While the thread is at work.
            append.encoded(self._engine.statements)
        await self._engine.threads.finish_together(self._gathering, append)
        return True

    async def read(self, reading: Reading) -> list[Item]:
        """Read in the loop what is short."""
        return await reading.begin(self._ask)

    def close(self) -> None:
        """Do nothing: the threads have the connections."""

    async def _ask(self, sql: str, params: Sequence[Any]) -> list[Any] | None:
        return self._engine.threads.here(partial(self._read, sql, params))

    def _read(
        self, sql: str, params: Sequence[Any], connection: BaseDatabaseWrapper
    ) -> list[Any] | None:
        """Return the rows of a statement; None where they are many, or large."""
        if is_watched(connection):
            return None
        rows: list[Any] = []
        left = CHARACTERS
        try:
            if not self._has_wal(connection):
                return None
            cursor = connection.connection.cursor(sqlite3.Cursor)
            cursor.execute(with_question_marks(sql), params)
            while left > 0 and len(rows) <= ROWS and (some := cursor.fetchmany(_SOME)):
                rows += some
                left -= sum(len(row[0]) for row in some if type(row[0]) is bytes)
            # Else it might keep its place in the file's history.
            cursor.close()
        except sqlite3.Error:
            # The thread tells what is wrong.
            return None
        return rows if left > 0 and len(rows) <= ROWS else None

    def _has_wal(self, connection: BaseDatabaseWrapper) -> bool:
        made = connection.connection
        mode = self._modes.get(connection)
        if mode is None or mode[0] is not made:
            (name,) = made.execute("PRAGMA journal_mode").fetchone()
            mode = self._modes[connection] = (made, name == "wal")
        return mode[1]


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
        if stored is None:
            errors += [_error(engine, append, is_first=False) for append in group]
            continue
        for append, is_stored in zip(group, stored, strict=True):
            error = None if is_stored else _error(engine, append, is_first=True)
            errors.append(error)
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
    engine: Engine, connection: BaseDatabaseWrapper, appends: Sequence[Append]
) -> list[bool] | None:
    """Store what can be stored in one transaction and return which batches it holds.

    Return None if it was rolled back or none can be shared.
    """
    statements = engine.statements
    calls = []
    try:
        for append in appends:
            batch = append.encoded(statements)
            if not statements.appends_alone(connection, batch):
                return None
            calls.append((append.key, batch))
        return statements.append_all(connection, calls)
    except InvalidItem:
        return None
    except (DatabaseError, InterfaceError) as exc:
        raise engine.storage_error(exc) from None


def _error(engine: Engine, append: Append, *, is_first: bool) -> BaseException | None:
    try:
        batch = append.encoded(engine.statements)
        append_batch(engine, append.key, batch, is_first=is_first)
    except Exception as exc:
        return exc
    return None
