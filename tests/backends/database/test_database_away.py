"""A database that can't be reached is an error of the store, in every operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from cryptography.fernet import Fernet
from django.db import connections
from pytest_django import DjangoDbBlocker

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import StorageError
from agent_sessions.handler import SessionBackendHandler
from tests.servers.process import free_port

DATABASE = "agent_sessions.backends.database.DatabaseBackend"
REDIS = "agent_sessions.backends.redis.RedisBackend"
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"
ITEMS: list[Any] = [{"role": "user", "content": "hello"}]

Operation = Callable[[BaseSessionBackend, SessionKey], Any]
OPERATIONS: dict[str, Operation] = {
    "append": lambda backend, key: backend.append(key, ITEMS),
    "latest": lambda backend, key: backend.latest(key, 5),
    "pop": lambda backend, key: backend.pop(key),
    "clear": lambda backend, key: backend.clear(key),
    "page": lambda backend, key: backend.page(key),
}
ASYNC: dict[str, Callable[[BaseSessionBackend, SessionKey], Awaitable[Any]]] = {
    "append": lambda backend, key: backend.aappend(key, ITEMS),
    "latest": lambda backend, key: backend.alatest(key, 5),
    "pop": lambda backend, key: backend.apop(key),
    "clear": lambda backend, key: backend.aclear(key),
    "page": lambda backend, key: backend.apage(key),
}


@pytest.fixture(params=["sqlite3", "postgresql", "mysql"])
def away(
    request: pytest.FixtureRequest, tmp_path: Path, django_db_blocker: DjangoDbBlocker
) -> Iterator[str]:
    """Return the alias of a database whose server is down, or whose folder is gone."""
    engine, alias = request.param, "away"
    pytest.importorskip({"postgresql": "psycopg", "mysql": "MySQLdb"}.get(engine, "os"))
    connections.databases[alias] = connections.settings["default"] | {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": str(tmp_path / "gone" / "database") if engine == "sqlite3" else "gone",
        "OPTIONS": {},
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
    }
    with django_db_blocker.unblock():
        yield alias
        connections[alias].close()
    del connections[alias], connections.databases[alias]


def build(kind: str, away: str) -> BaseSessionBackend:
    store = REDIS if kind == "redis" else DATABASE
    options: dict[str, Any] = {"database": away}
    if kind == "redis":
        # Before it asks the store, it asks whose the session is.
        options["url"] = f"redis://127.0.0.1:{free_port()}/0"
    outer = {
        "backend": "store",
        "keys": [Fernet.generate_key().decode()],
        "session_keys": kind == "session keys",
    }
    settings = {
        "store": {"BACKEND": store, "OPTIONS": options},
        "private": {"BACKEND": ENCRYPTED, "OPTIONS": outer},
    }
    is_plain = kind in {"plain", "redis"}
    return SessionBackendHandler(settings)["store" if is_plain else "private"]


KINDS = ["plain", "keys", "session keys", "redis"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_synchronous_operation_fails(kind: str, name: str, away: str) -> None:
    """The caller hears of the store, not of the driver."""
    backend = build(kind, away)
    with pytest.raises(StorageError, match="'away'"):
        OPERATIONS[name](backend, SessionKey("s"))
    backend.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ASYNC)
async def test_an_awaited_operation_fails(kind: str, name: str, away: str) -> None:
    """The caller hears of the store, not of the driver."""
    backend = build(kind, away)
    with pytest.raises(StorageError, match="'away'"):
        await ASYNC[name](backend, SessionKey("s"))
    await sync_to_async(backend.close)()
