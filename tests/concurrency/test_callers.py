"""Which connection a call gets: what its caller chose, and whom it waits for."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.test.utils import override_settings

from agent_sessions import checks as our_checks
from agent_sessions import get_session, sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.concurrency.connections import own_connection, sync_caller_waits
from agent_sessions.handler import DATABASE_BACKEND

ITEM: Any = {"role": "user", "content": "Hello"}
_asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="")
prepared: list[tuple[str, str, bool]] = []


def prepare(connection: Any) -> None:
    """Note who asks, on which connection and whether the loop's thread is held up."""
    is_main = threading.current_thread() is threading.main_thread()
    prepared.append((_asker.get(), connection.alias, is_main))


def configured(**options: Any) -> override_settings:
    backend = {"BACKEND": DATABASE_BACKEND, "OPTIONS": options}
    return override_settings(AGENT_SESSIONS={"default": backend})


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    prepared.clear()
    sessions.reset()
    yield
    sessions.reset()


class TestPrivateParts:
    """What others don't promise, and what is done without it."""

    def test_asgiref_says_whether_a_sync_caller_waits(self) -> None:
        async def main() -> bool:
            return sync_caller_waits()

        assert not sync_caller_waits()
        assert async_to_sync(main)()
        assert not asyncio.run(main())

    def test_asyncio_lets_the_threads_connection_be_found(self) -> None:
        mine = connections["default"]

        async def main() -> tuple[Any, Any]:
            return own_connection("default"), asyncio.get_running_loop()

        found, loop = asyncio.run(main())
        assert found is mine
        assert loop is not None
        assert own_connection("default") is mine

    def test_without_them_calls_go_to_the_pool(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr("asgiref.sync.AsyncToSync.executors")
        monkeypatch.delattr("asyncio._set_running_loop")

        async def main() -> tuple[bool, Any]:
            return sync_caller_waits(), own_connection("default")

        waits, found = asyncio.run(main())
        assert not waits
        assert found.alias == "default"


class Alternating:
    """Answer with what the caller's context says, and count the questions."""

    def __init__(self) -> None:
        self.askers: list[threading.Thread] = []

    def db_for_write(self, model: Any, **hints: Any) -> str:
        self.askers.append(threading.current_thread())
        return "default"


class TenantSyncRouter:
    """A router as django-tenants has one."""


@pytest.mark.django_db(transaction=True)
def test_a_router_is_asked_in_the_caller_alone() -> None:
    router = Alternating()

    async def main() -> None:
        session = get_session("routed")
        await session.add_items([ITEM])
        router.askers.clear()
        await session.add_items([ITEM])
        await session.get_items()
        await session.pop_item()
        await session.clear_session()

    with override_settings(DATABASE_ROUTERS=[router]):
        asyncio.run(main())
    assert router.askers
    assert set(router.askers) == {threading.current_thread()}


@pytest.mark.django_db(transaction=True)
class TestPrepared:
    @pytest.mark.parametrize("connections_", ["own", "request"])
    def test_each_call_is_prepared_for_its_caller(self, connections_: str) -> None:
        async def ask(name: str) -> None:
            _asker.set(name)
            session = get_session(name)
            await session.add_items([ITEM])
            assert len(await session.get_items(1)) == 1

        async def main() -> None:
            await asyncio.gather(ask("ann"), ask("bob"))
            # As the end of a request does.
            await sync_to_async(connections.close_all)()

        path = f"{__name__}.prepare"
        with configured(connections=connections_, prepare_connection=path):
            # A server's loop, in whose thread no session has been opened before.
            contextvars.Context().run(asyncio.run, main())
        assert sorted(prepared) == [
            ("ann", "default", False),
            ("ann", "default", False),
            ("bob", "default", False),
            ("bob", "default", False),
        ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"connections": "mine"}, "E023"),
        ({"prepare_connection": "no.such.module"}, "E024"),
        ({"prepare_connection": 7}, "E024"),
        ({"connections": "request", "prepare_connection": prepare}, None),
    ],
)
def test_wrong_options_are_told(options: Any, expected: str | None) -> None:
    with configured(**options):
        found = [each.id for each in our_checks.check_backends()]
    assert (f"agent_sessions.{expected}" in found) == (expected is not None)


@pytest.mark.parametrize(
    ("options", "setting", "is_told"),
    [
        ({}, {"MIDDLEWARE": ["django_tenants.middleware.TenantMiddleware"]}, True),
        ({}, {"MIDDLEWARE": ["site.rls.Middleware"]}, True),
        ({}, {"DATABASE_ROUTERS": [TenantSyncRouter()]}, True),
        ({}, {"MIDDLEWARE": ["site.urls.Girls"]}, False),
        ({"connections": "request"}, {"MIDDLEWARE": ["site.tenants.Of"]}, False),
        ({"connections": "own"}, {"MIDDLEWARE": ["site.tenants.Of"]}, False),
        ({"prepare_connection": prepare}, {"MIDDLEWARE": ["site.tenants.Of"]}, False),
    ],
)
def test_a_check_tells_who_sets_something_on_each_requests_connection(
    options: Any, setting: Any, is_told: bool
) -> None:
    with configured(**options), override_settings(**setting):
        found = our_checks.check_backends()
    assert ("agent_sessions.W009" in [each.id for each in found]) == is_told
