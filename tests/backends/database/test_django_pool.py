"""With Django's own pool the site keeps the connections that the conversations leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection, connections
from django.test.utils import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.handler import DATABASE_BACKEND
from tests.settings import DATABASE_KIND

SIZE = 8


@pytest.fixture(autouse=True)
def _pool(transactional_db: None) -> Iterator[None]:
    options = connection.settings_dict["OPTIONS"]
    connection.close()
    options["pool"] = {"min_size": 0, "max_size": SIZE, "timeout": 5}
    with override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": DATABASE_BACKEND, "OPTIONS": {"threads": 7}}
        }
    ):
        yield
        sessions.reset()
    connection.close()
    pooled: Any = connection
    pooled.close_pool()
    del options["pool"]


@pytest.mark.django_db(transaction=True)
class TestDjangosPool:
    __test__ = DATABASE_KIND == "postgres"

    def test_the_site_gets_all_connections_after_more_conversations(self) -> None:
        converse(range(SIZE * 3))
        together = threading.Barrier(SIZE)

        def ask(number: int) -> int:
            """Answer a request of the site, while as many others have connections."""
            try:
                with connections["default"].cursor() as cursor:
                    together.wait(10)
                    cursor.execute("SELECT %s", [number])
                    return int(cursor.fetchone()[0])
            finally:
                connections.close_all()

        with ThreadPoolExecutor(SIZE) as pool:
            assert list(pool.map(ask, range(SIZE))) == list(range(SIZE))
        converse(range(SIZE * 3))


def converse(numbers: range) -> None:
    async def turn(number: int) -> None:
        session = get_session(f"chat-{number}")
        for _ in range(3):
            await session.add_items([{"role": "user", "content": "Hello"}])
            assert await session.get_items(50)

    async def main() -> None:
        await asyncio.gather(*map(turn, numbers))

    asyncio.run(main())
