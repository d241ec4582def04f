"""The backend over a Django database: SQLite, PostgreSQL, MariaDB, MySQL."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from django.core import checks
from django.db import connections

from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.engine import Engine
from agent_sessions.backends.database.history import (
    Reading,
    append_batch,
    pop_newest,
    read_page,
)
from agent_sessions.backends.database.removal import Clearing
from agent_sessions.backends.database.rewriting import rewrite
from agent_sessions.backends.directory import Directory, database_for
from agent_sessions.backends.keys import Asking
from agent_sessions.backends.options import (
    CONNECTION_OPTIONS,
    did_you_mean_alias,
    read_policy,
)
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.settle import settle
from agent_sessions.concurrency.threads import DatabaseThreads, ThreadsByDatabase
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.items import Item
from agent_sessions.reports import leave, unwrapped

T = TypeVar("T")


class DatabaseBackend(BaseSessionBackend):
    """Keep items in a Django database.

    OPTIONS: `database`, an alias of DATABASES (default: the router's choice);
    `connections`, "own" (default) for connections of a pool that serve async callers,
    or "request" for the caller's own; `prepare_connection`, a function or its path that
    is called with the connection before each call of an async caller; `threads`, how
    many connections the pool has (default: 1 on SQLite, where more only wait for each
    other, else 8).
    """

    supports_pop_if = True
    session_class = "agent_sessions.memory.django.DjangoSession"
    option_defaults: ClassVar[dict[str, Any]] = {**CONNECTION_OPTIONS, "threads": None}

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.in_database = self
        self.database: str | None = self.options["database"]
        if self.database is not None and self.database not in connections:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: DATABASES has no alias "
                f"{self.database!r}; it has: {', '.join(sorted(connections))}.",
                hint=did_you_mean_alias(str(self.database), connections)
                + "Leave the option database out for the router's choice.",
                id="agent_sessions.E011",
            )
        policy = read_policy(alias, self.options)
        self._pools = ThreadsByDatabase(policy)
        self._engines: dict[str, Engine] = {}
        self._lock = new_lock()

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            engine = self.engine
            append_batch(engine, key, engine.statements.batch(items))

    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        engine = self.engine
        if limit == 0:
            engine.run(lambda connection: engine.directory.assert_own(key), alone=True)
            return []
        return Reading(engine, key, limit).finish()

    def pop(self, key: SessionKey) -> Item | None:
        return pop_newest(self.engine, key)

    def pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        return pop_newest(self.engine, key, asking)

    def rewrite(
        self, key: SessionKey, change: Callable[[Item], Item | None], **how: Any
    ) -> int:
        """See rewriting.rewrite()."""
        return rewrite(self.engine, key, change, **how)

    def clear(self, key: SessionKey) -> int:
        clearing = Clearing(self.engine, key)
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
        return self.ask(
            key, partial(read_page, before=before, after=after, limit=limit)
        )

    # -- async -------------------------------------------------------------------

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if not items:
            return
        engine = self.engine
        faster = engine.serving
        if faster is None or not await faster.append(key, items):
            await engine.threads.finish(self.append, key, items)

    @unwrapped
    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        before, engine = sys.exception(), self.engine
        try:
            faster = engine.serving
            if faster is None or limit == 0:
                return await engine.threads.run(self.latest, key, limit)
            return await faster.read(Reading(engine, key, limit))
        except Exception as exc:
            leave(exc, before)
            raise

    async def apop(self, key: SessionKey) -> Item | None:
        return await self.threads.finish(self.pop, key)

    async def apop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        return await self.threads.finish(self.pop_if, key, asking)

    async def aclear(self, key: SessionKey) -> int:
        return await settle(self._clear_in_steps(key))

    async def _clear_in_steps(self, key: SessionKey) -> int:
        engine = self.engine
        if not engine.threads.serves_caller():
            return await engine.threads.run(self.clear, key)
        clearing = Clearing(engine, key)
        while not clearing.is_done:
            # What others have waiting for the thread is done in between.
            await engine.threads.run(clearing.step)
        return clearing.count

    # -- configuration -------------------------------------------------------------

    @property
    def using(self) -> str:
        """The alias of DATABASES that holds the sessions."""
        return database_for(self.database)

    @property
    def engine(self) -> Engine:
        """What the database of this call needs; a method takes it once, at its start."""
        using = self.using
        return self._engines.get(using) or self._make_engine(using)

    def _make_engine(self, using: str) -> Engine:
        with self._lock:
            engine = self._engines.get(using)
            if engine is None:
                engine = self._engines[using] = Engine(
                    self.alias, using, self._pools.of(using), sender=type(self)
                )
            return engine

    @property
    def directory(self) -> Directory:
        return Directory(self.alias, self.using)

    @property
    def threads(self) -> DatabaseThreads:
        return self._pools.of(self.using)

    def check(self) -> list[checks.CheckMessage]:
        from agent_sessions.backends.database.checks import check_database

        return check_database(self)

    def close(self) -> None:
        with self._lock:
            engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.close()
        self._pools.close()

    # -- branches ------------------------------------------------------------------

    def ask(self, key: SessionKey, question: Callable[[Branches], T]) -> T:
        """Answer a question about a session's branches."""
        return self.engine.ask(key, question)

    async def aask(self, key: SessionKey, question: Callable[[Branches], T]) -> T:
        return await self.threads.run(self.ask, key, question)

    def change(self, key: SessionKey, change: Callable[[Branches], T]) -> T:
        """Change a session's branches, holding its row."""
        return self.engine.change(key, change)

    async def achange(self, key: SessionKey, change: Callable[[Branches], T]) -> T:
        return await self.threads.finish(self.change, key, change)
