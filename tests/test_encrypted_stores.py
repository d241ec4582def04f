"""The contract suite on encrypted sessions over Redis and Dapr."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from agent_sessions.checks import check_backends
from tests.servers import Server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import url
from tests.test_dapr_contract import damage
from tests.test_encrypted_contract import EncryptedContract, encrypted

pytestmark = [pytest.mark.one_database, pytest.mark.another_store]


class TestOverRedis(EncryptedContract):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _configured(self, redis_server: Server) -> Iterator[None]:
        backend = "agent_sessions.backends.redis.RedisBackend"
        inner = {"BACKEND": backend, "OPTIONS": {"url": url(redis_server)}}
        with override_settings(AGENT_SESSIONS=encrypted(inner)):
            yield

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        inner = session.backend.inner
        client = await inner.client()
        key = inner.names(session.key).items
        original = await client.execute_command("LINDEX", key, nth, NEVER_DECODE=True)
        await client.lset(key, nth, data)
        return str(original.decode())


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
        return damage(self.sidecar, session.key, nth, data)


def test_conversations_keep_no_envelopes() -> None:
    """The API takes items of its own types only: a check says so before a request."""
    inner = {
        "BACKEND": "agent_sessions.backends.openai.OpenAIConversationsBackend",
        "OPTIONS": {"api_key": "none"},
    }
    with override_settings(AGENT_SESSIONS=encrypted(inner)):
        (error,) = (m for m in check_backends() if m.id == "agent_sessions.E019")
    assert "OpenAIConversationsBackend" in error.msg
    assert error.hint
