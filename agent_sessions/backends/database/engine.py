"""One database of a backend: its SQL, its transactions and its threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.sql import statements_for
from agent_sessions.backends.database.sql.base import Held, Statements
from agent_sessions.backends.database.sql.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.transport.sqlite import SQLiteTransport
from agent_sessions.backends.directory import Directory
from agent_sessions.concurrency.connections import is_shared, transact
from agent_sessions.concurrency.threads import DatabaseThreads
from agent_sessions.exceptions import StorageError
from agent_sessions.reports import storage_error_of, told

if TYPE_CHECKING:
    from agent_sessions.backends.database.transport.postgresql import (
        PostgreSQLTransport,
    )

    Transport = PostgreSQLTransport | SQLiteTransport

T = TypeVar("T")


class Engine:
    """What a backend needs of the database that a call has been resolved to.

    A public method of the backend takes the engine once, in the caller. What runs
    below it, also in another thread, takes the engine and asks no router again.
    """

    def __init__(
        self, alias: str, using: str, threads: DatabaseThreads, *, sender: type
    ) -> None:
        self.alias = alias
        # The backend's class, which sends the signals.
        self.sender = sender
        self.using = using
        self.threads = threads
        self.directory = Directory(alias, using)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        return connections[self.using]

    @cached_property
    def statements(self) -> Statements:
        """The statements in the SQL of this database. Raises InvalidBackend."""
        return statements_for(self.connection, self.alias)

    @cached_property
    def transport(self) -> Transport | None:
        """What serves async callers faster than threads; None where nothing does."""
        connection, statements = self.connection, self.statements
        if connection.vendor == "sqlite":
            return SQLiteTransport(self)
        if not isinstance(
            statements, PostgreSQLStatements
        ) or not statements.can_be_awaited(connection):
            return None
        # It needs psycopg, which only PostgreSQL's users have.
        from agent_sessions.backends.database.transport.postgresql import (
            PostgreSQLTransport,
        )

        return PostgreSQLTransport(self, statements)

    @property
    def serving(self) -> Transport | None:
        """The transport if it may serve the running caller."""
        return self.transport if self.threads.serves_caller() else None

    def close(self) -> None:
        self.threads.close()
        if transport := vars(self).get("transport"):
            transport.close()

    def branches(self, key: SessionKey, held: Held | None = None) -> Branches:
        """Return the branches of a session; writing to them needs change()."""
        current = None if held is None else held.branch_id
        return Branches(self.directory, key, current)

    def ask(self, key: SessionKey, question: Callable[[Branches], T]) -> T:
        """Answer a question about a session's branches. Raises StorageError."""
        # In a transaction the plans of its statements go by indexes.
        alone = not is_shared(self.connection)
        return self.run(lambda connection: question(self.branches(key)), alone=alone)

    def change(self, key: SessionKey, change: Callable[[Branches], T]) -> T:
        """Change a session's branches while its row is held. Raises StorageError."""

        def run(connection: BaseDatabaseWrapper) -> T:
            return change(self.branches(key, self.lock(connection, key)))

        return self.run(run)

    def atomically(self, operation: Callable[[], T]) -> T:
        """Run an operation in one transaction; see run()."""
        return self.run(lambda connection: operation())

    def run(
        self, operation: Callable[[BaseDatabaseWrapper], T], *, alone: bool = False
    ) -> T:
        """Run an operation in one transaction, again where the database asks for it.

        `alone` says that the operation is atomic without a transaction. Raises
        StorageError.
        """
        connection = self.connection
        try:
            return transact(self.using, partial(operation, connection), alone=alone)
        except (DatabaseError, InterfaceError) as exc:
            raise self.storage_error(exc) from None

    def lock(self, connection: BaseDatabaseWrapper, key: SessionKey) -> Held | None:
        """Lock the session's row; return None if there is none.

        Raises SessionDoesNotExist, BranchDoesNotExist and LeaseLost.
        """
        with connection.cursor() as cursor:
            locked = self.statements.lock(cursor, key)
        if locked is None:
            self.directory.assert_own(key)
        if key.fence is not None:
            self.directory.assert_lease(key)
        return locked

    def storage_error(self, exc: Exception) -> StorageError:
        """Return the error that says that the database refused an operation."""
        error = storage_error_of(exc)(
            f"The database {self.using!r} refused the session's operation "
            f"({told(exc)}). Nothing was half-written. See that it is up, migrated and "
            "reachable, then try again."
        )
        error.number = next((each for each in exc.args if type(each) is int), None)
        return error
