"""Reading a source's tables: a file of SQLite, or an alias of DATABASES.

The schema of a file is somebody's program. So only tables are read, whose pages are
checked before, and no text is longer than it may be.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from django.db import DatabaseError, connections

from agent_sessions.reports import told
from agent_sessions.transfer.import_.records import (
    CELL_BYTES,
    SQLITE_MAGIC,
    UnreadableSource,
    as_text,
)

# What queries call: the file's own expressions may call anything.
_FUNCTIONS = frozenset({"count", "length", "max", "min"})
# What is wrong with a value, whatever the driver makes of it.
_ERRORS = (sqlite3.Error, ValueError, TypeError, OverflowError)


class TooLong(UnreadableSource):
    """A text of a source is longer than any of its kind."""


class Database(ABC):
    """A database to read from, in the few words that the sources need."""

    # Names the place in the marker of what was imported from it.
    name: str
    vendor: str
    # A parameter's place in a statement.
    mark: str

    def expect(self, tables: Collection[str]) -> None:  # noqa: B027 - aliases are trusted
        """Raise UnreadableSource unless only tables are read."""

    @abstractmethod
    def query(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> AbstractContextManager[Any]:
        """Run a query whose texts have up to so many bytes; yield its cursor.

        Raises TooLong, and UnreadableSource.
        """

    @abstractmethod
    def quote(self, name: str) -> str:
        """Quote the name of a table, which may have its schema before it."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection if it is the import's own."""

    def rows(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> list[tuple[Any, ...]]:
        with self.query(sql, params, longest=longest) as cursor:
            return list(cursor.fetchall())

    def stream(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> Iterator[tuple[Any, ...]]:
        """Return the rows of a query one by one, before another query is run."""
        with self.query(sql, params, longest=longest) as cursor:
            # Not `yield from`: its end closes a cursor whose connection may be closed.
            for row in cursor:  # noqa: UP028
                yield row

    def ids(self, sql: str, params: Sequence[Any]) -> array[int]:
        """Return whole numbers that may be very many."""
        with self.query(sql, params) as cursor:
            return array("q", (row[0] for row in cursor))

    def columns(self, table: str) -> set[str]:
        with self.query(f"SELECT * FROM {table} WHERE 1 = 0") as cursor:
            return {column[0].lower() for column in cursor.description}

    def marks(self, values: Sequence[Any]) -> str:
        return ", ".join([self.mark] * len(values))

    def _problem(self, exc: Exception) -> UnreadableSource:
        return UnreadableSource(
            f"Can't read {self.name} ({told(exc)}). See that it has the tables "
            "of the kind named, and that --sessions-table and --messages-table fit."
        )


class Alias(Database):
    mark = "%s"

    def __init__(self, alias: str) -> None:
        self.name = f"DATABASES[{alias!r}]"
        self._connection = connections[alias]
        self.vendor = self._connection.vendor

    @contextmanager
    def query(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> Iterator[Any]:
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, params)
                yield cursor
        except (DatabaseError, TypeError, ValueError) as exc:
            raise self._problem(exc) from None

    def quote(self, name: str) -> str:
        quoted = self._connection.ops.quote_name
        return ".".join(quoted(part) for part in name.split(".")).replace("%", "%%")

    def close(self) -> None:
        """Leave the connection, which is the project's."""


class SQLiteFile(Database):
    """A file of SQLite, opened for reading only."""

    vendor = "sqlite"
    mark = "?"

    def __init__(self, path: Path) -> None:
        path = path.resolve()
        self.name = as_text(path)
        self._copy = _copied(path, self.name)
        if self._copy is not None:
            path = Path(self._copy.name) / "source"
        try:
            self._connection = sqlite3.connect(
                f"file:{quote(os.fsencode(path))}?mode=ro",
                uri=True,
                timeout=20,
                isolation_level=None,
            )
        except _ERRORS as exc:
            raise UnreadableSource(f"Can't open {self.name}: {told(exc)}.") from None
        # Bytes that are no UTF-8 stay apart from text: see `as_text`.
        self._connection.text_factory = lambda data: data.decode(
            "utf-8", "surrogateescape"
        )
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
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
        if self.rows("PRAGMA encoding") != [("UTF-8",)]:
            raise UnreadableSource(
                f"{self.name} has its texts in UTF-16. Copy it into a file in UTF-8: "
                "sqlite3 OLD .dump | sqlite3 NEW."
            )
        names = {table.rpartition(".")[2].lower() for table in tables}
        for name in names:
            # There may be none, which is told where it is read.
            kinds = {row[2] for row in self.rows(f"PRAGMA table_list({_quote(name)})")}
            if not kinds <= {"table"}:
                raise UnreadableSource(
                    f"{name} of {self.name} is a view or a virtual table. Only tables "
                    "are read: copy what it shows into one."
                )
            if kinds and self.rows(f"PRAGMA integrity_check({_quote(name)})") != [
                ("ok",)
            ]:
                raise UnreadableSource(
                    f"{self.name} is damaged. Let SQLite's shell recover what is left, "
                    "with .recover, into a new file."
                )

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

    @contextmanager
    def query(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> Iterator[Any]:
        # A row counts as one text, and has some bytes of its own.
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest + CELL_BYTES)
        try:
            yield self._connection.execute(sql, tuple(params))
        except _ERRORS as exc:
            raise self._problem(exc) from None

    def quote(self, name: str) -> str:
        return ".".join(map(_quote, name.split(".")))

    def close(self) -> None:
        self._connection.close()
        if self._copy is not None:
            self._copy.cleanup()

    def _problem(self, exc: Exception) -> UnreadableSource:
        if isinstance(exc, sqlite3.DataError):
            return TooLong(
                f"Can't read {self.name}: it has an id, a name or a time of more than "
                f"{CELL_BYTES:,} bytes. Shorten it in the source."
            )
        return super()._problem(exc)


def _copied(path: Path, name: str) -> TemporaryDirectory[str] | None:
    """Copy a file of SQLite where reading it would leave something beside it.

    Who opens a file that keeps a write-ahead log makes two files beside it, which a
    reader can't remove again. So one that nobody has open is copied, with its log.
    """
    try:
        with path.open("rb") as file:
            head = file.read(20)
        if head and not head.startswith(SQLITE_MAGIC):
            raise UnreadableSource(
                f"{name} is no file of SQLite: it is not a database, or is packed. "
                "Name the KIND export if it is one."
            )
        has_log = head[18:] == b"\x02\x02"
        if not has_log or os.access(f"{path}-shm", os.R_OK | os.W_OK):
            return None
        folder = TemporaryDirectory(prefix="agent-sessions-")
        before = path.stat()
        for end in ("", "-wal"):
            if Path(f"{path}{end}").is_file():
                shutil.copyfile(f"{path}{end}", f"{folder.name}/source{end}")
        after = path.stat()
    except OSError as exc:
        raise UnreadableSource(
            f"Can't read {name}: {exc.strerror or type(exc).__name__}."
        ) from None
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        folder.cleanup()
        raise UnreadableSource(
            f"{name} was written to while it was read. Run the same command again."
        )
    return folder


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


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
