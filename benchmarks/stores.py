"""The stores that are compared: ours, the SDK's, and the drivers alone.

The raw ones do the least that keeps our promises: a batch is contiguous and whole,
positions are never given twice. They know no owners, branches, leases or columns for
the admin, run on one connection that nobody shares, and survive no lost connection.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from benchmarks.database import Database


class Session(Protocol):
    """What is measured of a session."""

    async def get_items(self, limit: int | None = None) -> list[Any]: ...

    async def add_items(self, items: list[Any]) -> None: ...


@dataclass(frozen=True)
class Store:
    """A way to keep sessions: how to open one by its id, and how to end."""

    name: str
    open: Callable[[str], Any]
    close: Callable[[], Awaitable[None]]
    # Lets go of a session object that is no longer used.
    release: Callable[[Any], None] = lambda session: None


async def postgresql_stores(database: Database) -> list[Store]:
    """Give the stores that PostgreSQL can hold; ours is the first."""
    return [
        _django("default", "DjangoSession"),
        _sqlalchemy(database),
        await _raw_asyncpg(database),
    ]


async def sqlite_stores(database: Database) -> list[Store]:
    """Give the stores that SQLite can hold; ours, at equal durability, is the first."""
    return [
        _django("default", "DjangoSession, synchronous=FULL"),
        _django("normal", "DjangoSession, synchronous=NORMAL"),
        _sqlite_session(database),
        _raw_sqlite3(database),
    ]


async def _nothing() -> None:
    """Close a store that has nothing to close."""


def _django(alias: str, name: str) -> Store:
    from agent_sessions import DjangoSession
    from agent_sessions.handler import sessions

    backend = sessions.database(alias)

    async def close() -> None:
        backend.close()

    return Store(
        name, lambda session_id: DjangoSession(session_id, database=alias), close
    )


def _sqlalchemy(database: Database) -> Store:
    from agents.extensions.memory import SQLAlchemySession
    from sqlalchemy.ext.asyncio import create_async_engine

    server = database.server
    engine = create_async_engine(
        f"postgresql+asyncpg://{server['user']}@{server['host']}:{server['port']}/peers"
    )

    def open_session(session_id: str) -> SQLAlchemySession:
        return SQLAlchemySession(session_id, engine=engine, create_tables=True)

    name = (
        f"SDK SQLAlchemySession (openai-agents {version('openai-agents')}, "
        f"SQLAlchemy {version('SQLAlchemy')}, asyncpg {version('asyncpg')})"
    )
    return Store(name, open_session, engine.dispose)


def _sqlite_session(database: Database) -> Store:
    from agents import SQLiteSession

    path = database.directory / "sdk.sqlite3"
    return Store(
        f"SDK SQLiteSession (openai-agents {version('openai-agents')})",
        lambda session_id: SQLiteSession(session_id, path),
        _nothing,
        # Each object has connections of its own.
        SQLiteSession.close,
    )


# --- asyncpg alone ---------------------------------------------------------------


async def _raw_asyncpg(database: Database) -> Store:
    import asyncpg

    server = database.server
    connection = await asyncpg.connect(**server, database="peers")
    await connection.execute(
        "CREATE TABLE raw_session (id text PRIMARY KEY, head bigint NOT NULL);"
        "CREATE TABLE raw_item (session_id text, position bigint, data text NOT NULL, "
        "PRIMARY KEY (session_id, position))"
    )
    return Store(
        f"raw asyncpg {version('asyncpg')}",
        lambda session_id: _RawAsyncpg(connection, session_id),
        connection.close,
    )


class _RawAsyncpg:
    def __init__(self, connection: Any, session_id: str) -> None:
        self.connection = connection
        self.session_id = session_id

    async def get_items(self, limit: int | None = None) -> list[Any]:
        rows = await self.connection.fetch(
            "SELECT data FROM raw_item WHERE session_id = $1 "
            "ORDER BY position DESC LIMIT $2",
            self.session_id,
            limit,
        )
        return [json.loads(row[0]) for row in reversed(rows)]

    async def add_items(self, items: list[Any]) -> None:
        await self.connection.execute(
            "WITH s AS (INSERT INTO raw_session VALUES ($1, $3) "
            "ON CONFLICT (id) DO UPDATE SET head = raw_session.head + $3 "
            "RETURNING head - $3 AS head) "
            "INSERT INTO raw_item SELECT $1, s.head + r.ordinal, r.data "
            "FROM s, unnest($2::text[]) WITH ORDINALITY AS r (data, ordinal)",
            self.session_id,
            [json.dumps(item) for item in items],
            len(items),
        )


# --- sqlite3 alone ---------------------------------------------------------------


def _raw_sqlite3(database: Database) -> Store:
    connection = sqlite3.connect(
        database.directory / "raw.sqlite3",
        isolation_level=None,
        check_same_thread=False,
    )
    connection.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE session (id text PRIMARY KEY, head integer NOT NULL);"
        "CREATE TABLE item (session_id text, position integer, data text NOT NULL, "
        "PRIMARY KEY (session_id, position))"
    )
    thread = ThreadPoolExecutor(1)

    async def close() -> None:
        thread.shutdown()
        connection.close()

    return Store(
        f"raw sqlite3 {sqlite3.sqlite_version} in a thread, synchronous=FULL",
        lambda session_id: _RawSQLite(connection, thread, session_id),
        close,
    )


class _RawSQLite:
    def __init__(
        self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, key: str
    ) -> None:
        self.connection = connection
        self.thread = thread
        self.session_id = key

    async def get_items(self, limit: int | None = None) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(
            self.thread, self._latest, limit
        )

    async def add_items(self, items: list[Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(
            self.thread, self._append, items
        )

    def _latest(self, limit: int | None) -> list[Any]:
        rows = self.connection.execute(
            "SELECT data FROM item WHERE session_id = ? ORDER BY position DESC LIMIT ?",
            (self.session_id, -1 if limit is None else limit),
        ).fetchall()
        return [json.loads(data) for (data,) in reversed(rows)]

    def _append(self, items: list[Any]) -> None:
        size = len(items)
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            (head,) = self.connection.execute(
                "INSERT INTO session VALUES (?, ?) ON CONFLICT (id) "
                "DO UPDATE SET head = head + ? RETURNING head",
                (self.session_id, size, size),
            ).fetchone()
            self.connection.executemany(
                "INSERT INTO item VALUES (?, ?, ?)",
                [
                    (self.session_id, head - size + index, json.dumps(item))
                    for index, item in enumerate(items, 1)
                ],
            )
