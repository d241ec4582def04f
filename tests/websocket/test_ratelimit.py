"""How often a user may do something: exact on every cache, open where it fails."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.core.cache import InvalidCacheBackendError, caches
from django.core.management import call_command
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext

from agent_sessions.consumers import AgentConsumer
from tests.servers import Server
from tests.servers.process import HOST, free_port
from tests.support.chat import Socket, create_conversation, make_user
from tests.support.ratelimits import Clocked, early_in_the_minute

PREFIX = "django.core.cache.backends"
TRIES = 50
ALLOWED = 20


def use(settings: Any, backend: str, location: Any = "", **more: Any) -> Clocked:
    """Make a cache of that kind; give a limit that counts in it."""
    alias = uuid.uuid4().hex[:8]
    cache = {"BACKEND": backend, "LOCATION": location, "KEY_PREFIX": alias, **more}
    settings.CACHES = {
        "default": {"BACKEND": f"{PREFIX}.locmem.LocMemCache"},
        alias: cache,
    }
    return Clocked("things", ALLOWED, cache=alias)


def concurrently(limit: Clocked, tries: int = TRIES) -> int:
    """Count how many of so many tries at once are let through."""
    barrier = Barrier(tries)

    def take(_: int) -> bool:
        barrier.wait()
        try:
            return limit.take(7)
        finally:
            caches[limit.cache].close()
            connections.close_all()

    with ThreadPoolExecutor(tries) as pool:
        return sum(pool.map(take, range(tries)))


def assert_counts(limit: Clocked) -> None:
    """Assert that a cache does all that a window promises."""
    assert concurrently(limit) == ALLOWED
    # Refused tries prolong nothing, and whoever asks next is refused too.
    assert not limit.take(7)
    assert limit.take(8)
    assert replace(limit, name="others").take(7)
    later = replace(limit, time=limit.time + limit.wait())
    assert [later.take(7) for _ in range(ALLOWED + 1)] == [True] * ALLOWED + [False]


@pytest.fixture
def cache_table(transactional_db: None) -> Iterator[str]:
    table = "ratelimit_cache"
    yield table
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE IF EXISTS {table}")


def test_memory_counts_exactly(settings: Any) -> None:
    assert_counts(use(settings, f"{PREFIX}.locmem.LocMemCache", uuid.uuid4().hex))


def test_djangos_redis_cache_counts_exactly(
    settings: Any, valkey_server: Server
) -> None:
    url = f"redis://{valkey_server.host}:{valkey_server.port}"
    assert_counts(use(settings, f"{PREFIX}.redis.RedisCache", url))


def test_django_redis_counts_exactly(settings: Any, redis_server: Server) -> None:
    url = f"redis://{redis_server.host}:{redis_server.port}"
    assert_counts(use(settings, "django_redis.cache.RedisCache", url))


def test_memcached_counts_exactly(settings: Any, memcached_server: Server) -> None:
    place = f"{memcached_server.host}:{memcached_server.port}"
    assert_counts(use(settings, f"{PREFIX}.memcached.PyMemcacheCache", place))


def test_a_database_cache_counts_exactly(settings: Any, cache_table: str) -> None:
    limit = use(settings, f"{PREFIX}.db.DatabaseCache", cache_table)
    call_command("createcachetable", verbosity=0)
    assert_counts(limit)


def test_a_full_window_costs_one_question(settings: Any, cache_table: str) -> None:
    limit = use(settings, f"{PREFIX}.db.DatabaseCache", cache_table)
    call_command("createcachetable", verbosity=0)
    assert concurrently(limit) == ALLOWED
    assert not limit.take(7)
    with CaptureQueriesContext(connection) as queries:
        assert not limit.take(7)
    assert len(queries) == 1


@pytest.mark.parametrize("seconds", [1, 60, 86_400])
def test_a_window_ends_with_its_last_second(settings: Any, seconds: int) -> None:
    limit = use(settings, f"{PREFIX}.locmem.LocMemCache", uuid.uuid4().hex)
    begin = 1_000_000_000 // seconds * seconds
    limit = replace(limit, limit=1, seconds=seconds, time=begin)
    assert limit.take(7)
    assert limit.wait() == seconds
    last = replace(limit, time=begin + seconds - 0.001)
    assert not last.take(7)
    assert last.wait() == 1
    assert replace(limit, time=begin + seconds).take(7)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_limit_may_be_any_number(settings: Any, count: int) -> None:
    limit = use(settings, f"{PREFIX}.locmem.LocMemCache", uuid.uuid4().hex)
    limit = replace(limit, limit=count)
    assert [limit.take(7) for _ in range(4)].count(True) == count


@pytest.mark.parametrize(
    "user_pk", [uuid.uuid4(), "white space", "é\x00\n" * 200, "\ud800", None]
)
def test_any_primary_key_makes_a_key_that_memcached_takes(
    settings: Any, memcached_server: Server, user_pk: Any
) -> None:
    place = f"{memcached_server.host}:{memcached_server.port}"
    limit = use(settings, f"{PREFIX}.memcached.PyMemcacheCache", place)
    limit = replace(limit, limit=1)
    assert [limit.take(user_pk), limit.take(user_pk)] == [True, False]


def test_a_memory_cache_that_is_small_still_counts_one_user(settings: Any) -> None:
    """It drops the keys that nobody asked for; how many were taken is asked for."""
    limit = use(
        settings,
        f"{PREFIX}.locmem.LocMemCache",
        uuid.uuid4().hex,
        OPTIONS={"MAX_ENTRIES": 5},
    )
    assert [limit.take(7) for _ in range(ALLOWED + 5)].count(True) == ALLOWED


# -- caches that fail ------------------------------------------------------------------


def _closed(scheme: str = "") -> str:
    return f"{scheme}{HOST}:{free_port()}"


DOWN: list[tuple[str, Callable[[], str], dict[str, Any]]] = [
    (f"{PREFIX}.redis.RedisCache", lambda: _closed("redis://:hidden@"), {}),
    ("django_redis.cache.RedisCache", lambda: _closed("redis://:hidden@"), {}),
    (
        "django_redis.cache.RedisCache",
        lambda: _closed("redis://:hidden@"),
        {"IGNORE_EXCEPTIONS": True},
    ),
    (f"{PREFIX}.memcached.PyMemcacheCache", _closed, {}),
    (f"{PREFIX}.memcached.PyMemcacheCache", _closed, {"ignore_exc": True}),
]


@pytest.mark.parametrize(("backend", "place", "options"), DOWN)
def test_nobody_is_locked_out_where_the_cache_is_down(
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    place: Callable[[], str],
    options: dict[str, Any],
) -> None:
    limit = replace(use(settings, backend, place(), OPTIONS=options), limit=1)
    with caplog.at_level(logging.WARNING, "agent_sessions.ratelimit"):
        assert all(limit.take(7) for _ in range(5))
    [warning] = [r for r in caplog.records if r.name == "agent_sessions.ratelimit"]
    assert limit.cache in warning.getMessage()
    assert "things" in warning.getMessage()
    assert "hidden" not in caplog.text


def test_nobody_is_locked_out_where_the_table_is_missing(
    settings: Any, transactional_db: None, caplog: pytest.LogCaptureFixture
) -> None:
    limit = use(settings, f"{PREFIX}.db.DatabaseCache", "no_such_table")
    assert all(limit.take(7) for _ in range(ALLOWED + 5))
    assert len(caplog.records) == 1


def test_a_dummy_cache_limits_nothing(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    limit = use(settings, f"{PREFIX}.dummy.DummyCache")
    assert all(limit.take(7) for _ in range(ALLOWED + 5))
    assert not caplog.records


def test_a_cache_that_comes_back_counts_again(
    settings: Any, valkey_server: Server
) -> None:
    limit = replace(
        use(settings, f"{PREFIX}.redis.RedisCache", _closed("redis://")), limit=1
    )
    assert limit.take(7)
    url = f"redis://{valkey_server.host}:{valkey_server.port}"
    again = use(settings, f"{PREFIX}.redis.RedisCache", url)
    limit = replace(limit, cache=again.cache)
    assert [limit.take(7), limit.take(7)] == [True, False]


def test_an_alias_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidCacheBackendError):
        Clocked("things", 1, cache="nowhere").take(7)


def test_files_count_too(settings: Any, tmp_path: Path) -> None:
    limit = use(settings, f"{PREFIX}.filebased.FileBasedCache", str(tmp_path))
    assert [limit.take(7) for _ in range(ALLOWED + 5)].count(True) == ALLOWED


# -- frames ----------------------------------------------------------------------------


async def outcomes(tab: Socket, count: int) -> list[str]:
    """Read until so many frames were answered: codes of refusals, starts of runs."""
    found: list[str] = []
    while len(found) < count:
        frame = await tab.frame(within=20)
        if frame["id"].startswith("refused:"):
            found.append(frame["chunk"]["code"])
        elif frame["chunk"]["type"] == "RUN_STARTED":
            found.append("started")
    return found


@pytest.mark.django_db(transaction=True)
async def test_of_fifty_frames_at_once_exactly_twenty_pass() -> None:
    """They come over five sockets; a conversation that is busy was counted before."""
    user = await sync_to_async(make_user)()
    rows = [await sync_to_async(create_conversation)(user) for _ in range(5)]
    agent = Agent(
        name="speaker",
        model=ScriptedModel([[assistant_message("Hi")] for _ in range(50)]),
    )
    early_in_the_minute(10)
    async with AsyncExitStack() as stack:
        tabs = [
            await stack.enter_async_context(Socket(row.session_id, user, agent))
            for row in rows
        ]
        for number in range(10):
            for tab in tabs:
                await tab.say(f"{tab.session_id[:8]}-{number}", "Hi")
        found = await asyncio.gather(*(outcomes(tab, 10) for tab in tabs))
    codes = Counter(code for tab in found for code in tab)
    assert codes.keys() <= {"started", "session_busy", "rate_limited"}
    assert codes["rate_limited"] == 50 - AgentConsumer.max_runs_per_minute


class Clockwork(AgentConsumer):
    """Counts runs by a rule of its own."""

    async def check_rate(self) -> bool:
        limit = Clocked("clockwork", 1)
        return await sync_to_async(limit.take)(self.user.pk)


@pytest.mark.django_db(transaction=True)
@pytest.mark.one_database
async def test_a_consumer_may_count_otherwise() -> None:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    agent = Agent(name="a", model=ScriptedModel([[assistant_message("Hi")]]))
    async with Socket(row.session_id, user, agent, consumer=Clockwork) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await tab.say("r-2", "Hi")
        assert (await tab.frame())["chunk"]["code"] == "rate_limited"
