"""The backend over a Django database: SQLite, PostgreSQL, MariaDB, MySQL."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from django.core import checks
from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    connections,
    router,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.database import awaiting
from agent_sessions.backends.database.answers import Held
from agent_sessions.backends.database.appending import append_together
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.history import read_page
from agent_sessions.backends.database.popping import pop_newest
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.reading import read_newest
from agent_sessions.backends.database.removal import Clearing
from agent_sessions.backends.database.rewriting import Rewriting
from agent_sessions.backends.database.shortreads import ShortReads
from agent_sessions.backends.database.statements import AnyBatch, Statements
from agent_sessions.backends.database.vendors import statements_for
from agent_sessions.backends.database.wires import Wires
from agent_sessions.backends.directory import Directory
from agent_sessions.backends.keys import Asking
from agent_sessions.backends.spelling import did_you_mean_alias
from agent_sessions.concurrency.batching import Gathering
from agent_sessions.concurrency.settle import settle
from agent_sessions.concurrency.threads import DatabaseThreads
from agent_sessions.exceptions import InvalidBackend, StorageError
from agent_sessions.items import Decode, Item, decode_all
from agent_sessions.models import AgentSession
from agent_sessions.reports import leave, told, unwrapped

T = TypeVar("T")

# MariaDB's and MySQL's "deadlock found" and "lock wait timeout exceeded".
_RETRIED_ERRORS = frozenset({1213, 1205})
_ATTEMPTS = 8


class DatabaseBackend(BaseSessionBackend):
    """Keep items in a Django database.

    OPTIONS: `database`, an alias of DATABASES (default: the router's choice);
    `threads`, how many connections serve async callers (default: 1 on SQLite,
    where more only wait for each other, else 8).
    """

    supports_branches = True
    supports_trimming = True
    supports_pop_if = True
    supports_rewriting = True
    takes_decoder = True
    session_class = "agent_sessions.memory.django.DjangoSession"
    option_defaults: ClassVar[dict[str, Any]] = {"database": None, "threads": None}

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.database: str | None = self.options["database"]
        if self.database is not None and self.database not in connections:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: DATABASES has no alias "
                f"{self.database!r}; it has: {', '.join(sorted(connections))}.",
                hint=did_you_mean_alias(str(self.database), connections)
                + "Leave the option database out for the router's choice.",
                id="agent_sessions.E011",
            )
        threads = self.options["threads"]
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
        ):
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: threads must be a whole number of 1 or "
                f"more, not {threads!r}.",
                hint="Leave it out for 1 on SQLite and 8 on other databases.",
                id="agent_sessions.E012",
            )
        self._threads: DatabaseThreads | None = None
        self._wires: Wires | None = None
        self._short_reads: ShortReads | None = None
        self._statements: dict[str, Statements] = {}
        self._gathering = Gathering(partial(append_together, self))

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            self.append_batch(
                key, self.statements(connections[self.using]).batch(items)
            )

    def append_batch(self, key: SessionKey, batch: AnyBatch) -> None:
        """Store a batch that is encoded, as append() does."""
        try:
            self._append_batch(key, batch)
        except (StorageError, UnicodeEncodeError) as exc:
            connection = connections[self.using]
            narrowed = self.statements(connection).narrowed(connection, batch, exc)
            if narrowed is None:
                raise
            self._append_batch(key, narrowed)

    def _append_batch(self, key: SessionKey, batch: AnyBatch) -> None:
        connection = connections[self.using]
        statements = self.statements(connection)
        alone = statements.appends_alone(connection, batch)

        def write(connection: BaseDatabaseWrapper) -> bool:
            return statements.append(connection, key, batch, timezone.now())

        def begin(connection: BaseDatabaseWrapper) -> bool:
            self.directory.create(key)
            return write(connection)

        while not (self.run(write, alone=alone) or self.run(begin)):
            pass

    def latest(
        self, key: SessionKey, limit: int | None, decode: Decode = decode_all
    ) -> list[Item]:
        if limit == 0:
            self.run(lambda connection: self.directory.assert_own(key), alone=True)
            return []
        return read_newest(self, key, limit, None, decode)

    def pop(self, key: SessionKey) -> Item | None:
        return pop_newest(self, key)

    def pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        return pop_newest(self, key, asking)

    def rewrite(
        self,
        key: SessionKey,
        change: Callable[[Item], Item | None],
        *,
        unless: str = "",
        batch_size: int = 500,
    ) -> int:
        return Rewriting(self, key, change, unless, batch_size).run()

    def clear(self, key: SessionKey) -> int:
        clearing = Clearing(self, key)
        while not clearing.is_done:
            clearing.step()
        return clearing.count

    def page(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        return self.run(
            lambda connection: read_page(
                self.branches(key), before=before, after=after, limit=limit
            ),
            alone=True,
        )

    # -- async -------------------------------------------------------------------

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if not items:
            return
        statements = self.statements(connections[self.using])
        if statements.appends_together:
            append = awaiting.make_ready(statements, key, items)
            await self.threads.finish_together(self._gathering, append)
        elif not await awaiting.write(self, key, items):
            await self.threads.finish(self.append, key, items)

    @unwrapped
    async def alatest(
        self, key: SessionKey, limit: int | None, decode: Decode = decode_all
    ) -> list[Item]:
        before = sys.exception()
        try:
            items, own = await awaiting.read(self, key, limit, decode)
            if items is not None:
                return items
            if own is None:
                # A subclass's own latest() may take none.
                more = () if decode is decode_all else (decode,)
                return await self.threads.run(self.latest, key, limit, *more)
            return await self.threads.run(read_newest, self, key, limit, own, decode)
        except Exception as exc:
            leave(exc, before)
            raise

    async def apop(self, key: SessionKey) -> Item | None:
        return await self.threads.finish(self.pop, key)

    async def aclear(self, key: SessionKey) -> int:
        return await settle(self._clear_in_steps(key))

    async def _clear_in_steps(self, key: SessionKey) -> int:
        clearing = Clearing(self, key)
        while not clearing.is_done:
            # What others have waiting for the thread is done in between.
            await self.threads.run(clearing.step)
        return clearing.count

    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        return await self.threads.run(
            self.page, key, before=before, after=after, limit=limit
        )

    # -- configuration -------------------------------------------------------------

    @property
    def using(self) -> str:
        """The alias of DATABASES that holds the sessions."""
        return self.database or router.db_for_write(AgentSession)

    @property
    def directory(self) -> Directory:
        """The rows of this alias's sessions."""
        return Directory(self.alias, self.using)

    @property
    def wires(self) -> Wires | None:
        """The connections that serve async callers without a thread, where that goes."""
        if self._wires is None or self._wires.database != self.using:
            connection = connections[self.using]
            statements = self.statements(connection)
            if not isinstance(statements, PostgreSQLStatements):
                return None
            if not statements.can_be_awaited(connection):
                return None
            self._wires = Wires(self.using, self.threads.size, statements.prepared)
        return self._wires

    @property
    def short_reads(self) -> ShortReads | None:
        """The reads that the event loop does itself, where the database is a file."""
        threads = self.threads
        if self._short_reads is None or self._short_reads.threads is not threads:
            if connections[threads.database].vendor != "sqlite":
                return None
            self._short_reads = ShortReads(threads)
        return self._short_reads

    @property
    def in_database(self) -> DatabaseBackend:
        return self

    @property
    def threads(self) -> DatabaseThreads:
        """The threads that serve async callers."""
        if self._threads is None or self._threads.database != self.using:
            using = self.using
            size = self.options["threads"] or (
                1 if connections[using].vendor == "sqlite" else 8
            )
            self._threads = DatabaseThreads(using, size)
        return self._threads

    def check(self) -> list[checks.CheckMessage]:
        from agent_sessions.backends.database.checks import check_database

        return check_database(self)

    def close(self) -> None:
        threads, self._threads = self._threads, None
        wires, self._wires = self._wires, None
        self._statements = {}
        if threads is not None:
            threads.close()
        if wires is not None:
            wires.close()

    # -- branches ------------------------------------------------------------------

    def branches(self, key: SessionKey, held: Held | None = None) -> Branches:
        """Return the branches of a session; writing to them needs change()."""
        current = None if held is None else held.branch_id
        return Branches(self.directory, key, current)

    def ask(self, key: SessionKey, question: Callable[[Branches], T]) -> T:
        """Answer a question about a session's branches."""
        return self.run(lambda connection: question(self.branches(key)), alone=True)

    async def aask(self, key: SessionKey, question: Callable[[Branches], T]) -> T:
        """See ask()."""
        return await self.threads.run(self.ask, key, question)

    def change(self, key: SessionKey, change: Callable[[Branches], T]) -> T:
        """Change a session's branches, holding its row."""

        def run(connection: BaseDatabaseWrapper) -> T:
            return change(self.branches(key, self.lock(connection, key)))

        return self.run(run)

    async def achange(self, key: SessionKey, change: Callable[[Branches], T]) -> T:
        """See change()."""
        return await self.threads.finish(self.change, key, change)

    # -- operations ----------------------------------------------------------------

    def atomically(self, operation: Callable[[], T]) -> T:
        """Run an operation in one transaction, again where the database asks for it.

        Raises StorageError.
        """
        return self.run(lambda connection: operation())

    def run(
        self, operation: Callable[[BaseDatabaseWrapper], T], *, alone: bool = False
    ) -> T:
        """Run one operation in one transaction, again where the database asks for it.

        `alone` says that the operation is atomic without a transaction. Raises
        StorageError.
        """
        connection = connections[self.using]
        attempts = 1 if connection.in_atomic_block else _ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                if alone:
                    return operation(connection)
                with transaction.atomic(self.using):
                    return operation(connection)
            except OperationalError as exc:
                if attempt == attempts or not _is_retried(exc):
                    raise self.storage_error(exc) from None
                time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311
            except (DatabaseError, InterfaceError) as exc:
                raise self.storage_error(exc) from None
        raise AssertionError("the last attempt returns or raises")

    def storage_error(self, exc: Exception) -> StorageError:
        """Say that the database refused an operation."""
        error = StorageError(
            f"The database {self.using!r} refused the session's operation "
            f"({told(exc)}). Nothing was half-written. See that it is up, migrated and "
            "reachable, then try again."
        )
        error.number = next((each for each in exc.args if type(each) is int), None)
        return error

    def statements(self, connection: BaseDatabaseWrapper) -> Statements:
        """Return the statements in the words of a connection's database."""
        statements = self._statements.get(connection.alias)
        if statements is None:
            statements = statements_for(connection, self.alias)
            self._statements[connection.alias] = statements
        return statements

    def lock(self, connection: BaseDatabaseWrapper, key: SessionKey) -> Held | None:
        """Hold the session's row; None where it isn't there."""
        with connection.cursor() as cursor:
            locked = self.statements(connection).lock(cursor, key)
        if locked is None:
            self.directory.assert_own(key)
        if key.fence is not None:
            self.directory.assert_lease(key)
        return locked


def _is_retried(exc: OperationalError) -> bool:
    return bool(exc.args) and exc.args[0] in _RETRIED_ERRORS
