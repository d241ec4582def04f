"""Absurd places in histories of every store, asked for in Django's admin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentSession
from tests.servers import Server
from tests.servers.conversations import KEY, conversations_server
from tests.servers.dapr import DaprSidecar
from tests.servers.redis import url as redis_url
from tests.support.admin_pages import RIGHTS, page, staff, url

# The stores of others use no part of the database.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

BACKENDS = "agent_sessions.backends"
LARGEST = 2**63 - 1


@pytest.fixture
def redis_store(redis_server: Server) -> dict[str, Any]:
    options = {"url": redis_url(redis_server, 4)}
    return {"BACKEND": f"{BACKENDS}.redis.RedisBackend", "OPTIONS": options}


@pytest.fixture
def dapr_store(dapr_server: DaprSidecar) -> dict[str, Any]:
    options = {"store_name": "statestore"}
    return {"BACKEND": f"{BACKENDS}.dapr.DaprBackend", "OPTIONS": options}


@pytest.fixture
def openai_store() -> Iterator[dict[str, Any]]:
    with conversations_server() as server:
        options = {"api_key": KEY, "base_url": server.url}
        backend = f"{BACKENDS}.openai.OpenAIConversationsBackend"
        yield {"BACKEND": backend, "OPTIONS": options}


@pytest.fixture
def sdk_store(tmp_path: Any) -> dict[str, Any]:
    options = {
        "session": "agents.memory.SQLiteSession",
        "db_path": str(tmp_path / "x.db"),
    }
    return {"BACKEND": f"{BACKENDS}.sdk.SDKBackend", "OPTIONS": options}


@pytest.mark.parametrize("store", ["redis", "dapr", "openai", "sdk"])
def test_they_are_answered(store: str, request: Any, settings: Any) -> None:
    settings.AGENT_SESSIONS = {"default": request.getfixturevalue(f"{store}_store")}
    items = [{"role": "user", "content": f"m{n}."} for n in range(1, 4)]
    sessions["default"].append(SessionKey("chat"), items)
    row = AgentSession.objects.get()
    client: Client = staff(*RIGHTS)
    assert ">m1.<" in page(client, url("change", row))
    for name in ("before", "after"):
        for place in (0, 1, 10**15, 10**18, LARGEST - 1, LARGEST, LARGEST + 1):
            page(client, url("change", row) + f"?{name}={place}")
    for place in (0, 4, 10**15, 10**18, LARGEST - 1, LARGEST, LARGEST + 1, 10**4000):
        response = client.get(url("item", row, 1).replace("/1/", f"/{place}/"))
        assert response.status_code in {302, 404}
