"""SQLite's own cursor, for the statements of the hot path."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

# What a statement raises, whichever cursor it goes by.
ERRORS = (DatabaseError, sqlite3.DatabaseError)


class DirectCursor(CursorWrapper):
    """A cursor as Django gives it, without what it does to each statement.

    On SQLite that takes about as long as the statement. Statements have %s for each
    parameter, and no other %. What they raise is sqlite3's until the end of the cursor's
    block, which raises Django's errors in their place.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        with connection.wrap_database_errors:
            cursor = connection.connection.cursor(sqlite3.Cursor)
        super().__init__(cursor, connection)

    def execute(self, sql: Any, params: Any = ()) -> Any:
        return self.cursor.execute(with_question_marks(sql), params)

    def executemany(self, sql: Any, param_list: Sequence[Any]) -> Any:
        return self.cursor.executemany(with_question_marks(sql), param_list)

    def fetchone(self) -> Any:
        return self.cursor.fetchone()

    def fetchall(self) -> Any:
        return self.cursor.fetchall()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cursor.close()
        if isinstance(error, sqlite3.Error):
            with self.db.wrap_database_errors:
                raise error


def is_watched(connection: BaseDatabaseWrapper) -> bool:
    """Return whether somebody wants to see statements pass through Django's cursors."""
    return connection.queries_logged or bool(connection.execute_wrappers)


@lru_cache(maxsize=256)
def with_question_marks(sql: str) -> str:
    """Write a statement as sqlite3 reads it."""
    return sql.replace("%s", "?")
