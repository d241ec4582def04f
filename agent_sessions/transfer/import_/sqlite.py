"""A file of SQLite from anywhere: whatever it was made to do, it is only read.

Its schema is somebody's program. So only tables are read, whose columns are stored and
not computed; their pages are checked before; no text is longer than it may be, and no
query goes on for longer than a file of this size can need.
"""

from __future__ import annotations

import re
import sqlite3
from array import array
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from django.db import connections

from agent_sessions.reports import told
from agent_sessions.transfer.import_.databases import (
    CELL_BYTES,
    Alias,
    Database,
    TooLong,
    as_text,
)
from agent_sessions.transfer.import_.places import Place
from agent_sessions.transfer.import_.records import UnreadableSource

# Steps of SQLite's virtual machine that each query may take, and for each byte of the
# file: reading a row takes about ten.
_STEPS = 20_000_000
_STEPS_PER_BYTE = 4
# Steps between two looks at how many there were.
_LOOK = 10_000
_FUNCTIONS = frozenset({"count", "length", "max", "min", "substr", "typeof"})
_TABLE = re.compile(r"CREATE\s+TABLE\b", re.IGNORECASE)
# What is wrong with a value, whatever the driver makes of it.
_ERRORS = (sqlite3.Error, ValueError, TypeError, OverflowError)


class SQLiteFile(Database):
    """A file of SQLite, opened for reading only."""

    vendor = "sqlite"
    mark = "?"

    def __init__(self, path: Path) -> None:
        self.name = as_text(str(path.resolve()))
        self._most = _STEPS + _STEPS_PER_BYTE * path.stat().st_size
        self._steps = 0
        self._place = Place(path.resolve(), self.name)
        try:
            self._connection = sqlite3.connect(
                self._place.uri, uri=True, timeout=20, isolation_level=None
            )
        except _ERRORS as exc:
            self._place.close()
            raise UnreadableSource(f"Can't open {self.name}: {told(exc)}.") from None
        self._connection.text_factory = _text
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self._connection.set_progress_handler(self._look, _LOOK)
        for pragma in (
            "trusted_schema = OFF",
            "query_only = ON",
            "cell_size_check = ON",
            "mmap_size = 0",
            # They are the file's own expressions, and the check below would run them.
            "ignore_check_constraints = ON",
        ):
            self.rows(f"PRAGMA {pragma}")

    def expect(self, tables: Collection[str]) -> None:
        for table in tables:
            self._check_table(table)
        names = {_name(table).lower() for table in tables}

        def authorize(
            action: int,
            first: str | None,
            second: str | None,
            schema: str | None,
            view: str | None,
        ) -> int:
            allowed = view is None and (
                action == sqlite3.SQLITE_SELECT
                or (action == sqlite3.SQLITE_READ and (first or "").lower() in names)
                or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS)
            )
            return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

        self._connection.set_authorizer(authorize)

    def rows(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> list[tuple[Any, ...]]:
        self._begin(longest)
        try:
            with closing(self._connection.execute(sql, tuple(params))) as cursor:
                found = cursor.fetchall()
        except _ERRORS as exc:
            raise self._problem(exc) from None
        self._place.check()
        return found

    def ids(self, sql: str, params: Sequence[Any]) -> array[int]:
        self._begin()
        try:
            with closing(self._connection.execute(sql, tuple(params))) as cursor:
                found = array("q", (row[0] for row in cursor))
        except _ERRORS as exc:
            raise self._problem(exc) from None
        self._place.check()
        return found

    def columns(self, table: str) -> set[str]:
        self._begin()
        sql = f"SELECT * FROM {table} WHERE 1 = 0"
        try:
            with closing(self._connection.execute(sql)) as cursor:
                return {column[0].lower() for column in cursor.description}
        except _ERRORS as exc:
            raise self._problem(exc) from None

    def quote(self, name: str) -> str:
        return ".".join(map(_quote, name.split(".")))

    def close(self) -> None:
        self._connection.close()
        self._place.close()

    def _begin(self, longest: int = CELL_BYTES) -> None:
        """Set the limits of a query."""
        self._steps = 0
        # A row counts as one text, and has some bytes of its own.
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest + CELL_BYTES)

    def _look(self) -> int:
        self._steps += _LOOK
        return int(self._steps > self._most)

    def _check_table(self, table: str) -> None:
        """Refuse what is computed, and what is damaged."""
        name = _name(table)
        quoted = _quote(name)
        columns = self.rows(f"PRAGMA table_xinfo({quoted})")
        if not columns:
            # There is none, which is told where it is read.
            return
        if not self._is_table(name):
            raise UnreadableSource(
                f"{table} of {self.name} is a view or a virtual table. Only tables are "
                "read: copy what it shows into one."
            )
        if any(column[-1] for column in columns) or self._has_computed_index(quoted):
            raise UnreadableSource(
                f"{table} of {self.name} has computed columns or indexes, which aren't "
                "read. Copy it into a table without them."
            )
        ((found, *_), *_) = self.rows(f"PRAGMA integrity_check({quoted})") or [
            ("no answer",)
        ]
        if found != "ok":
            raise UnreadableSource(
                f"{self.name} is damaged: {found}. Let SQLite's shell recover what is "
                "left, with .recover, into a new file."
            )

    def _is_table(self, name: str) -> bool:
        """Return whether a name is a table's, in the schema's text and as it is read."""
        made = self.rows(
            "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND name = ? COLLATE NOCASE",
            [name],
        )
        # Releases of SQLite before 3.37 don't know it, and give nothing.
        kinds = {row[2] for row in self.rows(f"PRAGMA table_list({_quote(name)})")}
        return (
            len(made) == 1
            and isinstance(made[0][0], str)
            and _TABLE.match(made[0][0]) is not None
            and kinds <= {"table"}
        )

    def _has_computed_index(self, quoted: str) -> bool:
        """Return whether a table has a partial index, or one of expressions."""
        for _, name, _, _, is_partial in self.rows(f"PRAGMA index_list({quoted})"):
            columns = self.rows(f"PRAGMA index_xinfo({_quote(name)})")
            # An expression is column -2, the row's own number -1.
            if is_partial or any(column[1] == -2 for column in columns):
                return True
        return False

    def _problem(self, exc: Exception) -> UnreadableSource:
        self._place.check()
        if isinstance(exc, sqlite3.OperationalError) and self._steps > self._most:
            return UnreadableSource(
                f"Can't read {self.name}: a query takes more steps than a file of this "
                "size can need. It is damaged, or was made to do so."
            )
        if isinstance(exc, sqlite3.DataError):
            return TooLong(
                f"Can't read {self.name}: it has an id, a name or a time of more than "
                f"{CELL_BYTES:,} bytes. Shorten it in the source."
            )
        return super()._problem(exc)


def open_database(place: str) -> Database:
    """Open an alias of DATABASES, or else a file. Raises UnreadableSource."""
    if place in connections:
        return Alias(place)
    path = Path(place)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        raise UnreadableSource(
            f"--from {place!r} is neither an alias of DATABASES "
            f"({', '.join(sorted(connections))}) nor a file."
        )
    return SQLiteFile(path)


def _name(table: str) -> str:
    """Return a table's name without its schema."""
    return table.rpartition(".")[2]


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
