"""Reading a source's tables: a file of SQLite, or an alias of DATABASES."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import Any

from django.db import DatabaseError, connections
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from agent_sessions.reports import told
from agent_sessions.times import stored
from agent_sessions.transfer.import_.records import UnreadableSource

# Bytes of an id, a name or a time in a source: many times what one has.
CELL_BYTES = 64 * 1024
# Bytes of one item. What is read into memory is a small multiple of it.
ITEM_BYTES = 32 * 1024 * 1024


class TooLong(UnreadableSource):
    """A text of a source is longer than any of its kind."""


class Garbled(bytes):
    """A text of SQLite that is no UTF-8."""


class Database(ABC):
    """A database to read from, in the few words that the sources need."""

    # Names the place in the marker of what was imported from it.
    name: str
    vendor: str
    # A parameter's place in a statement.
    mark: str

    def expect(self, tables: Collection[str]) -> None:  # noqa: B027 - aliases are trusted
        """See that nothing but tables is read. Raises UnreadableSource."""

    @abstractmethod
    def rows(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> list[tuple[Any, ...]]:
        """Run a query whose texts have up to so many bytes.

        Raises TooLong, and UnreadableSource.
        """

    @abstractmethod
    def ids(self, sql: str, params: Sequence[Any]) -> array[int]:
        """Run a query for whole numbers that may be very many."""

    @abstractmethod
    def columns(self, table: str) -> set[str]:
        """Name a table's columns. Raises UnreadableSource."""

    @abstractmethod
    def quote(self, name: str) -> str:
        """Quote the name of a table, which may have its schema before it."""

    def raw(self, column: str) -> str:
        """Return an expression for a text as it is stored."""
        # SQLite's text may be no UTF-8, which the driver refuses to decode.
        return {
            "sqlite": f"CAST({column} AS BLOB)",
            "postgresql": f"{column}::text",
        }.get(self.vendor, column)

    def size(self, column: str) -> str:
        """Return an expression for the bytes of a text."""
        function = "length" if self.vendor == "sqlite" else "octet_length"
        return f"{function}({self.raw(column)})"

    def time(self, column: str) -> str:
        """Return an expression for a time that no driver chokes on."""
        # Neither one that isn't a time, nor one that isn't even text, or is a book.
        return (
            f"substr(CAST({column} AS BLOB), 1, 64)"
            if self.vendor == "sqlite"
            else column
        )

    def value(self, column: str) -> str:
        """Return two expressions for a value of any type, which `as_value` reads."""
        if self.vendor != "sqlite":
            return f"{column}, 'any'"
        return f"CAST({column} AS BLOB), typeof({column})"

    def marks(self, values: Sequence[Any]) -> str:
        """Return the places of several parameters."""
        return ", ".join([self.mark] * len(values))

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection, if it is the import's own."""

    def _problem(self, exc: Exception) -> UnreadableSource:
        return UnreadableSource(
            f"Can't read {self.name} ({told(exc)}). See that it has the tables "
            "of the kind named, and that --sessions-table and --messages-table fit."
        )


class Alias(Database):
    """An alias of DATABASES."""

    mark = "%s"

    def __init__(self, alias: str) -> None:
        self.name = f"DATABASES[{alias!r}]"
        self._connection = connections[alias]
        self.vendor = self._connection.vendor

    def rows(
        self, sql: str, params: Sequence[Any] = (), *, longest: int = CELL_BYTES
    ) -> list[tuple[Any, ...]]:
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, params)
                return list(cursor.fetchall())
        except (DatabaseError, ValueError) as exc:
            raise self._problem(exc) from None

    def ids(self, sql: str, params: Sequence[Any]) -> array[int]:
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, params)
                return array("q", (row[0] for row in cursor))
        except (DatabaseError, ValueError) as exc:
            raise self._problem(exc) from None

    def columns(self, table: str) -> set[str]:
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(f"SELECT * FROM {table} WHERE 1 = 0", [])
                return {column[0].lower() for column in cursor.description}
        except (DatabaseError, ValueError) as exc:
            raise self._problem(exc) from None

    def quote(self, name: str) -> str:
        quote = self._connection.ops.quote_name
        return ".".join(quote(part) for part in name.split(".")).replace("%", "%%")

    def close(self) -> None:
        """Leave the connection, which is the project's."""


def as_text(value: Any) -> str:
    """Return a stored text in characters that every database takes.

    What isn't text, NUL and bytes that are no UTF-8, is spelled with backslashes.
    """
    if isinstance(value, memoryview):
        value = value.tobytes()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = "" if value is None else str(value)
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\x00", "\\x00")


def as_value(value: Any, kind: str) -> Any:
    """Read what `Database.value` gave; text that is no UTF-8 comes as `Garbled`."""
    if kind == "text":
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Garbled(value)
    return {"integer": int, "real": float}.get(kind, lambda same: same)(value)


def as_time(value: Any, zone: tzinfo) -> datetime | None:
    """Read a source's time; one without an offset is of `zone`."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        try:
            value = parse_datetime(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    # Years at the very ends can't be moved to another zone.
    if not 2 <= value.year <= 9998:
        return None
    aware = value if value.utcoffset() is not None else value.replace(tzinfo=zone)
    aware = aware.astimezone(timezone.get_fixed_timezone(timedelta(0)))
    return stored(aware)
