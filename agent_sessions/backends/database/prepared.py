"""Statements that PostgreSQL plans once for a connection, not at every call."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.database.direct import is_watched

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# "invalid_sql_statement_name", "duplicate_prepared_statement" and "cached plan must not
# change result type": a pooler has changed the connection, or a migration the table.
_REFUSALS = frozenset({"26000", "42P05", "0A000"})

# What the driver's connections have prepared: several backends may share one.
_known: WeakKeyDictionary[Any, set[bytes]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Answer:
    """How many rows a statement touched, and the values that it gives for each."""

    count: int
    rows: Sequence[Sequence[Any]]


class PreparedStatements:
    """Execute statements by a name under which the connection has them planned.

    Planning takes about as long as executing them, and as long again takes what the
    drivers' cursors do, which these statements don't need: they go to libpq, whose
    values are bytes. A name tells the text, so a connection that somebody else has
    prepared can't run something else; where a pooler hands out connections that
    haven't, the statements go plain from then on.
    """

    def __init__(self) -> None:
        self.enabled = True

    def execute(
        self, connection: BaseDatabaseWrapper, sql: str, params: Sequence[Any]
    ) -> Answer:
        """Execute a statement, prepared if that can't do any harm."""
        # What Django does before it makes a cursor.
        connection.close_if_health_check_failed()
        connection.validate_thread_sharing()
        if not self._may_prepare(connection):
            return _plainly(connection, sql, params)
        try:
            name = self.prepare(connection, sql)
            with connection.wrap_database_errors, connection.connection.lock:
                pgconn = connection.connection.pgconn
                return answer_of(pgconn.exec_prepared(name, wire_values(params)))
        except DatabaseError as exc:
            if not self.is_refusal(exc):
                raise
            return _plainly(connection, sql, params)

    def prepare(self, connection: BaseDatabaseWrapper, sql: str) -> bytes:
        """Have a connection plan a statement that it doesn't know; give its name."""
        named = _named(sql)
        if not self.knows(connection, sql):
            # Not by PREPARE, of which newer poolers that keep count don't learn.
            with connection.wrap_database_errors, connection.connection.lock:
                pgconn = connection.connection.pgconn
                checked(pgconn.prepare(named.name, named.text))
            _known.setdefault(connection.connection, set()).add(named.name)
        return named.name

    def name(self, sql: str) -> bytes:
        """Return the name under which connections have a statement planned."""
        return _named(sql).name

    def knows(self, connection: BaseDatabaseWrapper, sql: str) -> bool:
        """Return whether a connection has a statement planned."""
        return self.name(sql) in _known.get(connection.connection, ())

    def is_refusal(self, error: DatabaseError) -> bool:
        """Return whether the server refuses prepared statements, and give them up then.

        Nothing has been done then: each is a transaction of its own.
        """
        if getattr(error.__cause__, "sqlstate", None) not in _REFUSALS:
            return False
        self.enabled = False
        return True

    def may_prepare_on(self, connection: BaseDatabaseWrapper) -> bool:
        """Return whether a connection of our own may prepare statements."""
        return (
            self.enabled
            and not is_watched(connection)
            # How Django is told of a pooler between it and the server.
            and not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS")
        )

    def _may_prepare(self, connection: BaseDatabaseWrapper) -> bool:
        return (
            self.may_prepare_on(connection)
            # A refusal would end the caller's transaction.
            and not connection.in_atomic_block
            and connection.get_autocommit()
            # psycopg2 has no such way.
            and hasattr(connection.connection, "pgconn")
            # Ctrl-C doesn't reach into libpq.
            and threading.current_thread() is not threading.main_thread()
        )


def _plainly(
    connection: BaseDatabaseWrapper, sql: str, params: Sequence[Any]
) -> Answer:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        rows = [] if cursor.description is None else cursor.fetchall()
        return Answer(cursor.rowcount, rows)


def wire_values(params: Sequence[Any]) -> list[bytes | None]:
    """Write parameters as the server reads them."""
    return [None if value is None else str(value).encode() for value in params]


def answer_of(result: PGresult) -> Answer:
    """Read what the server gave. Raises psycopg.Error."""
    return Answer(checked(result).command_tuples or 0, rows_of(result))


def checked(result: PGresult) -> PGresult:
    """Return what the server gave. Raises psycopg.Error where that is an error."""
    from psycopg.pq import ExecStatus

    if result.status not in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
        raise _error(result)
    return result


def rows_of(result: PGresult) -> list[list[Any]]:
    """Read the rows that the server gave."""
    columns = range(result.nfields)
    return [
        [result.get_value(row, column) for column in columns]
        for row in range(result.ntuples)
    ]


def _error(result: PGresult) -> Exception:
    from psycopg import OperationalError, errors
    from psycopg.pq import DiagnosticField

    state = (result.error_field(DiagnosticField.SQLSTATE) or b"").decode()
    try:
        kind = errors.lookup(state)
    except KeyError:
        # The connection itself has no state to tell.
        kind = OperationalError
    return kind(result.error_message.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class _Named:
    name: bytes
    text: bytes


@lru_cache(maxsize=256)
def _named(sql: str) -> _Named:
    digest = hashlib.sha256(sql.encode()).hexdigest()
    name = f"agent_sessions_{digest[:16]}"
    first, *rest = sql.split("%s")
    text = first + "".join(f"${n}{part}" for n, part in enumerate(rest, 1))
    return _Named(name.encode(), text.encode())
