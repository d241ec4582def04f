"""Reads from SQLite that take less time than to wake a thread and be woken by it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.answers import Text
from agent_sessions.backends.database.direct import is_watched, with_question_marks
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.threads import DatabaseThreads

# What the event loop reads at most, in rows and in characters: it has others to serve,
# though a thread that decodes as much holds it up as well.
ROWS = 100
CHARACTERS = 250_000
# Of so many sessions it is remembered whether they are short.
_SESSIONS = 1_000


class ShortReads:
    """Reads by the event loop itself, on the connection of a thread that has rest.

    Only of sessions that a thread has read before, so that they lie in the system's
    cache, and only under WAL, where a read waits for no writer.
    """

    def __init__(self, threads: DatabaseThreads) -> None:
        self.threads = threads
        self._lock = new_lock()
        # Of sessions that a thread has read, whether more than that isn't known.
        self._short: dict[_Name, bool] = {}
        self._modes: WeakKeyDictionary[BaseDatabaseWrapper, _Mode] = WeakKeyDictionary()

    def learn(self, key: SessionKey, texts: Sequence[Text]) -> None:
        """Take note of what was read of a session."""
        is_short = len(texts) <= ROWS and sum(map(len, texts)) <= CHARACTERS
        with self._lock:
            self._short[_name(key)] = is_short
            if len(self._short) > _SESSIONS:
                del self._short[next(iter(self._short))]

    def rows(
        self, key: SessionKey, sql: str, params: Sequence[Any]
    ) -> list[tuple[Any, ...]] | None:
        """Read rows; None where a thread has to."""
        if not self._short.get(_name(key)):
            return None
        rows = self.threads.here(partial(self._read, sql, params))
        return rows if rows is None or len(rows) <= ROWS else None

    def _read(
        self, sql: str, params: Sequence[Any], connection: BaseDatabaseWrapper
    ) -> list[tuple[Any, ...]] | None:
        """Read up to one row more than is short."""
        if is_watched(connection):
            return None
        try:
            if not self._has_wal(connection):
                return None
            cursor = connection.connection.cursor(sqlite3.Cursor)
            cursor.execute(with_question_marks(sql), params)
            rows: list[tuple[Any, ...]] = cursor.fetchmany(ROWS + 1)
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
# A connection, which a mode is of, and whether that is WAL.
_Mode = tuple[sqlite3.Connection, bool]
