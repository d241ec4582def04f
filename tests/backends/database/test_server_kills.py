"""Servers that are killed under appenders, poppers and a clearer, again and again.

`AGENT_SESSIONS_KILLS` is how often in each test. The servers write to the disk before
they acknowledge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from tests.servers import redis
from tests.servers.lasting import mortal_database
from tests.servers.mortal import Mortal, mortal
from tests.settings import DATABASE_KIND
from tests.support.storm import Plan, rage

REDIS = "agent_sessions.backends.redis.RedisBackend"
DATABASE = "agent_sessions.backends.database.DatabaseBackend"

clears = pytest.mark.parametrize("clears", [False, True], ids=["pops", "clears"])
encrypts = pytest.mark.parametrize("encrypts", [False, True], ids=["plain", "keys"])


@pytest.fixture(scope="module")
def database() -> Iterator[tuple[Mortal, dict[str, str]]]:
    """Run a server of the database that the tests run on, with a database of its own."""
    with mortal_database(DATABASE_KIND) as found:
        yield found


def assert_holds(
    plan: Plan, server: Mortal, environment: dict[str, str], name: str
) -> None:
    """Assert that nothing goes wrong while a server is killed."""
    told = rage(plan, server, environment)
    if report := os.environ.get("AGENT_SESSIONS_KILLS_REPORT"):
        with Path(report).open("a") as file:
            file.write(
                json.dumps(
                    {"store": name, "encrypts": bool(plan.keys), "clears": plan.clears}
                    | told
                )
                + "\n"
            )
    figures = told["figures"]
    assert told["violations"] == []
    assert figures["appended"]
    assert figures["popped"]
    assert bool(figures["clears"]) == plan.clears
    assert bool(figures["refused"]) == bool(plan.keys)


@pytest.mark.one_database
@clears
@encrypts
@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_kills_of_a_redis(
    kind: str, encrypts: bool, clears: bool, database_environment: dict[str, str]
) -> None:
    """What is acknowledged stays, once and in its order, and what is popped goes."""
    with mortal(redis.recipe(kind, *redis.DURABLE)) as server:
        url = f"redis://{server.host}:{server.port}/0"
        setting = {"BACKEND": REDIS, "OPTIONS": {"url": url}}
        plan = Plan("s", setting, clears, keys() if encrypts else ())
        assert_holds(plan, server, database_environment, f"{kind}")


@pytest.mark.django_db
@pytest.mark.skipif(DATABASE_KIND == "sqlite", reason="SQLite has no server")
@clears
@encrypts
def test_kills_of_a_database(
    encrypts: bool, clears: bool, database: tuple[Mortal, dict[str, str]]
) -> None:
    """What is acknowledged stays, once and in its order, and what is popped goes."""
    server, environment = database
    plan = Plan(
        f"{encrypts}{clears}", {"BACKEND": DATABASE}, clears, keys() if encrypts else ()
    )
    assert_holds(plan, server, environment, f"{DATABASE_KIND}")


def keys() -> tuple[str, str]:
    """Return a key, and another one."""
    return Fernet.generate_key().decode(), Fernet.generate_key().decode()
