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

from agent_sessions.backends.database.history import MANY, Reading, Text, append_batch
from agent_sessions.backends.database.sql.base import AnyBatch, Statements
from agent_sessions.backends.database.sql.sqlite import is_watched, with_question_marks
from agent_sessions.backends.keys import SessionKey
from agent_sessions.concurrency.batching import Gathering, for_each
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.exceptions import InvalidItem, StorageError
from agent_sessions.items import Item

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# What the event loop reads at most, in rows and in characters: it has others to serve,
# though a thread that decodes as much holds it up as well.
ROWS = 100
CHARACTERS = 250_000
# Of so many sessions it is remembered whether they are short.
_SESSIONS = 1_000
# A transaction begins with no batch that makes it longer than this many items: other
# processes wait for it.
_LONG = 200


class SQLiteTransport:
    """Reads in the loop, on the connection of a thread that has rest, and shared commits.

    It takes less time to read a short session than to wake a thread and be woken by it.
    Only sessions that a thread has read before are read so: they lie in the system's
    cache. And only under WAL, where a read waits for no writer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.threads = engine.threads
        self._gathering = Gathering(partial(append_together, engine))
        self._lock = new_lock()
        # Of sessions that a thread has read, whether more than that isn't known.
        self._short: dict[_Name, bool] = {}
        self._modes: WeakKeyDictionary[BaseDatabaseWrapper, _Mode] = WeakKeyDictionary()

    async def append(self, key: SessionKey, items: Sequence[Item]) -> bool:
        """Store a batch with the others that wait for the thread. Return True."""
        append = Append(key, items)
        if len(items) <= MANY:
            # While the thread is at work.
            append.encoded(self._engine.statements)
        await self.threads.finish_together(self._gathering, append)
        return True

    async def read(self, reading: Reading) -> list[Item]:
        """Read in the loop what is known to be short."""
        if self.is_short(reading.key):
            items = await reading.begin(self._ask)
        else:
            items = await self.threads.run(reading.finish)
        self.learn(reading.key, reading.texts)
        return items

    def close(self) -> None:
        """Do nothing: the threads have the connections."""

    def learn(self, key: SessionKey, texts: Sequence[Text]) -> None:
        is_short = len(texts) <= ROWS and sum(map(len, texts)) <= CHARACTERS
        with self._lock:
            self._short[_name(key)] = is_short
            if len(self._short) > _SESSIONS:
                del self._short[next(iter(self._short))]

    def is_short(self, key: SessionKey) -> bool:
        return self._short.get(_name(key), False)

    async def _ask(self, sql: str, params: Sequence[Any]) -> list[_Row] | None:
        rows = self.threads.here(partial(self._read, sql, params))
        return rows if rows is None or len(rows) <= ROWS else None

    def _read(
        self, sql: str, params: Sequence[Any], connection: BaseDatabaseWrapper
    ) -> list[_Row] | None:
        """Read up to one row more than is short."""
        if is_watched(connection):
            return None
        try:
            if not self._has_wal(connection):
                return None
            cursor = connection.connection.cursor(sqlite3.Cursor)
            cursor.execute(with_question_marks(sql), params)
            rows: list[_Row] = cursor.fetchmany(ROWS + 1)
            # Else it might keep its place in the file's history.
            cursor.close()
        except sqlite3.Error:
            # The thread tells what is wrong.
            return None
        return rows

    def _has_wal(self, connection: BaseDatabaseWrapper) -> bool:
        made = connection.connection
        mode = self._modes.get(connection)
        if mode is None or mode[0] is not made:
            (name,) = made.execute("PRAGMA journal_mode").fetchone()
            mode = self._modes[connection] = (made, name == "wal")
        return mode[1]


def _name(key: SessionKey) -> _Name:
    # Without the fence: each run has one of its own, and reads once.
    return key.session_id, key.user_id, key.branch


_Name = tuple[str, Any, str | None]
_Row = tuple[Any, ...]
# A connection, which a mode is of, and whether that is WAL.
_Mode = tuple[sqlite3.Connection, bool]


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
