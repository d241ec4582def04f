"""The drivers alone: the least that keeps our promises.

A batch is contiguous and whole, positions are never given twice. They know no owners,
branches, leases or columns for the admin, and survive no lost connection.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from benchmarks.database import Database
from benchmarks.stores import Store

# As many as our threads.
_CONNECTIONS = 8


async def asyncpg_store(database: Database, port: int) -> Store:
    """Run asyncpg on tables of its own."""
    import asyncpg

    server = {**database.server, "port": port}
    opened = [
        await asyncpg.connect(**server, database="peers") for _ in range(_CONNECTIONS)
    ]
    await opened[0].execute(
        "CREATE TABLE IF NOT EXISTS raw_session "
        "(id text PRIMARY KEY, head bigint NOT NULL);"
        "CREATE TABLE IF NOT EXISTS raw_item (session_id text, position bigint, "
        "data text NOT NULL, PRIMARY KEY (session_id, position))"
    )
    idle: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
    for connection in opened:
        idle.put_nowait(connection)

    async def close() -> None:
        for connection in opened:
            await connection.close()

    return Store(
        "asyncpg alone",
        f"asyncpg {version('asyncpg')}",
        lambda session_id: _RawAsyncpg(idle, session_id),
        close,
    )


class _RawAsyncpg:
    def __init__(self, idle: asyncio.LifoQueue[Any], session_id: str) -> None:
        self.idle = idle
        self.session_id = session_id

    async def get_items(self, limit: int | None = None) -> list[Any]:
        connection = await self.idle.get()
        rows = await connection.fetch(
            "SELECT data FROM raw_item WHERE session_id = $1 "
            "ORDER BY position DESC LIMIT $2",
            self.session_id,
            limit,
        )
        self.idle.put_nowait(connection)
        return [json.loads(row[0]) for row in reversed(rows)]

    async def add_items(self, items: list[Any]) -> None:
        connection = await self.idle.get()
        await connection.execute(
            "WITH s AS (INSERT INTO raw_session VALUES ($1, $3) "
            "ON CONFLICT (id) DO UPDATE SET head = raw_session.head + $3 "
            "RETURNING head - $3 AS head) "
            "INSERT INTO raw_item SELECT $1, s.head + r.ordinal, r.data "
            "FROM s, unnest($2::text[]) WITH ORDINALITY AS r (data, ordinal)",
            self.session_id,
            [json.dumps(item) for item in items],
            len(items),
        )
        self.idle.put_nowait(connection)

    async def clear_session(self) -> None:
        connection = await self.idle.get()
        await connection.execute(
            "DELETE FROM raw_item WHERE session_id = $1", self.session_id
        )
        self.idle.put_nowait(connection)


def sqlite3_store(database: Database) -> Store:
    """Run sqlite3 in one thread, at the SDK's durability."""
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
        "sqlite3 alone",
        f"sqlite3 {sqlite3.sqlite_version} in a thread, synchronous=FULL",
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

    async def clear_session(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.thread, self._clear)

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

    def _clear(self) -> None:
        self.connection.execute(
            "DELETE FROM item WHERE session_id = ?", (self.session_id,)
        )
