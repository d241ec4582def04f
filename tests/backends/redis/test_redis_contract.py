"""The contract suite on Redis 8, Valkey, a Redis cluster and Sentinel."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from agents.memory import Session
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.test import override_settings

from agent_sessions import RedisSession, get_session, sessions
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.testing.reading import ReadingCases, ShapeCases
from agent_sessions.testing.writing import ConcurrencyCases, PoppingCases
from tests.servers import Server
from tests.servers.redis import SERVICE, Watched, url
from tests.support.contract import OnThePool, StoreContract

T = TypeVar("T")
BACKEND = "agent_sessions.backends.redis.RedisBackend"
pytestmark = pytest.mark.one_database


class RedisContract(StoreContract):
    supports_corrupt = True
    supports_wrapper = True
    supports_clear_alias = True
    foreign_error = SessionDoesNotExist
    examples = 8

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        return await sync_to_async(create)(f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        client = await session.backend.client()
        key = session.backend.names(session.key).items
        original = await client.execute_command("LINDEX", key, nth, NEVER_DECODE=True)
        await client.lset(key, nth, data)
        return str(original.decode())


class InTransaction(RedisContract):
    """The caller holds a transaction, so its own connection serves the rows."""

    supports_owner = True
    # Other threads have connections of their own, which can't see its rows.
    supports_threads = False


@pytest.mark.another_store
@pytest.mark.django_db
class TestRedisCluster(InTransaction):
    @pytest.fixture(autouse=True)
    def _settings(self, redis_cluster: list[Server]) -> Iterator[None]:
        options = {"url": url(redis_cluster[0]), "cluster": True}
        setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
        with override_settings(AGENT_SESSIONS=setting):
            yield


@pytest.mark.another_store
@pytest.mark.django_db
class TestValkey(InTransaction):
    @pytest.fixture(autouse=True)
    def _settings(self, valkey_server: Server) -> Iterator[None]:
        options = {"url": url(valkey_server)}
        setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
        with override_settings(AGENT_SESSIONS=setting):
            yield


@pytest.mark.django_db
@pytest.mark.another_store
class TestValkeyBehindSentinels(InTransaction):
    """Through an alias of CACHES, with a client that decodes and a sliding ttl."""

    @pytest.fixture(autouse=True)
    def _settings(self, valkey_sentinel: Watched) -> Iterator[None]:
        pool = {"decode_responses": True}
        cache = sentinel_cache(valkey_sentinel, CONNECTION_POOL_KWARGS=pool)
        options = {"cache": "watched", "ttl": 3600}
        setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
        with override_settings(CACHES={"watched": cache}, AGENT_SESSIONS=setting):
            yield


def sentinel_cache(watched: Watched, **options: Any) -> dict[str, Any]:
    """Return an alias of CACHES as django-redis documents it for Sentinel."""
    return {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": f"redis://{SERVICE}/0",
        "OPTIONS": {
            "CLIENT_CLASS": "django_redis.client.SentinelClient",
            "CONNECTION_FACTORY": "django_redis.pool.SentinelConnectionFactory",
            "SENTINELS": watched.sentinels,
            **options,
        },
    }


class TestRedis8(OnThePool, RedisContract):
    """No transaction is open: rows and items are seen by other threads at once."""

    supports_owner = True
    supports_second_process = True

    @pytest.fixture(autouse=True)
    def _settings(self, redis_server: Server) -> Iterator[None]:
        options = {"url": url(redis_server)}
        self.setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
        with override_settings(AGENT_SESSIONS=self.setting):
            yield

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        threads = sessions["default"].threads
        return await threads.run(create, f"{name}-{uuid.uuid4()}")

    def process_source(self) -> str:
        return f"""
import json
import django
from django.conf import settings
settings.AGENT_SESSIONS = json.loads({json.dumps(self.setting)!r})
django.setup()
from agent_sessions import get_session

async def make_session(session_id):
    return get_session(session_id)
"""


@pytest.mark.another_store
class TestStandalone(ShapeCases, ReadingCases, PoppingCases, ConcurrencyCases):
    """RedisSession.from_url: no row, no settings; its store is the one above."""

    supports_corrupt = True
    supports_wrapper = True
    supports_clear_alias = True
    corrupt = RedisContract.corrupt

    @pytest.fixture(autouse=True)
    def _server(self, redis_server: Server) -> None:
        self.url = url(redis_server, 2)

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return RedisSession.from_url(session_id, self.url, **options)

    def run_coroutine(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run(main())
