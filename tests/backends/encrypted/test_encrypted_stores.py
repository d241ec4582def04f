"""The contract suite on encrypted sessions over each store but the database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from agent_sessions.backends.wrapping import innermost
from tests.backends.dapr.test_dapr_contract import damage
from tests.backends.encrypted.test_encrypted_contract import (
    EncryptedContract,
    encrypted,
)
from tests.backends.redis.test_redis_contract import sentinel_cache
from tests.servers import Server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import Watched, url

BACKEND = "agent_sessions.backends.redis.RedisBackend"
pytestmark = [pytest.mark.one_database, pytest.mark.another_store]


def over_redis(**options: Any) -> Any:
    """Return settings under which a Redis of these options is encrypted."""
    inner = {"BACKEND": BACKEND, "OPTIONS": options}
    return override_settings(AGENT_SESSIONS=encrypted(inner))


class OverARedis(EncryptedContract):
    __test__ = False

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        inner: Any = innermost(session.backend)
        client = await inner.client()
        key = inner.names(session.key).items
        original = await client.execute_command("LINDEX", key, nth, NEVER_DECODE=True)
        await client.lset(key, nth, data)
        return str(original.decode())


class TestOverRedis(OverARedis):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, redis_server: Server) -> Iterator[None]:
        with over_redis(url=url(redis_server)):
            yield


class TestOverValkey(OverARedis):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, valkey_server: Server) -> Iterator[None]:
        with over_redis(url=url(valkey_server)):
            yield


class TestOverARedisCluster(OverARedis):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, redis_cluster: list[Server]) -> Iterator[None]:
        with over_redis(url=url(redis_cluster[0]), cluster=True):
            yield


class TestBehindSentinels(OverARedis):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, valkey_sentinel: Watched) -> Iterator[None]:
        caches = {"watched": sentinel_cache(valkey_sentinel)}
        with override_settings(CACHES=caches), over_redis(cache="watched"):
            yield


class TestOverDapr(EncryptedContract):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, dapr_server: DaprSidecar) -> Iterator[None]:
        self.sidecar = dapr_server
        inner = {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE, "segment_size": 4},
        }
        with override_settings(AGENT_SESSIONS=encrypted(inner)):
            yield

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        return damage(self.sidecar, session.key, nth, data, "private")
