"""Two tenants that a router tells apart share a store, and nothing that lies in it."""

from __future__ import annotations

import asyncio
import contextvars
import shutil
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connections
from django.test import override_settings
from pytest_django import DjangoDbBlocker

from agent_sessions import get_session, sessions
from agent_sessions.models import AgentSession
from agent_sessions.ratelimit import RateLimit
from agent_sessions.runs.log import group_of
from agent_sessions.runs.setup import Conversation
from agent_sessions.runs.watching import place_of
from tests.backends.database import tenants
from tests.backends.database.tenants import TENANTS, tenant_of
from tests.servers import Server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import url

pytestmark = pytest.mark.one_database

ROUTERS = {"context": tenants.ByContext(), "thread": tenants.ByThread()}


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def _empty(
    django_db_blocker: DjangoDbBlocker, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Migrate a database, to be copied for each tenant and test."""
    path = tmp_path_factory.mktemp("tenants") / "empty"
    with django_db_blocker.unblock():
        add("empty", path)
        call_command("migrate", database="empty", verbosity=0)
        remove("empty")
    return path


def add(alias: str, path: Path) -> None:
    connections.settings[alias] = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(path),
        "OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 20},
    }
    connections.settings = connections.configure_settings(connections.settings)


def remove(alias: str) -> None:
    connections[alias].close()
    del connections[alias]
    del connections.settings[alias]


@pytest.fixture(params=["redis", "dapr"])
def store(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the BACKEND of a store that knows nothing of databases, and its OPTIONS."""
    if request.param == "redis":
        server: Server = request.getfixturevalue("redis_server")
        options = {"url": url(server, 3), "key_prefix": uuid.uuid4().hex}
        return {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": options,
        }
    sidecar: DaprSidecar = request.getfixturevalue("dapr_server")
    assert sidecar.records is not None
    return {
        "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
        "OPTIONS": {"store_name": STORE},
    }


@pytest.fixture(params=ROUTERS)
def users(
    request: pytest.FixtureRequest,
    store: dict[str, Any],
    _empty: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    django_db_blocker: DjangoDbBlocker,
) -> Iterator[dict[str, Any]]:
    """Return each tenant's user; both have the same primary key."""
    if request.param == "thread":
        # Its answer exists only in the thread of a request.
        store["OPTIONS"]["connections"] = "request"
    # A file, too: connections to a database in memory are always lent.
    name = str(tmp_path / "default")
    monkeypatch.setitem(connections.settings["default"], "NAME", name)
    with django_db_blocker.unblock():
        for name in TENANTS:
            add(name, Path(shutil.copy(_empty, tmp_path / name)))
        with override_settings(
            AGENT_SESSIONS={"default": store},
            DATABASE_ROUTERS=[ROUTERS[request.param]],
        ):
            yield {
                name: get_user_model()._default_manager.using(name).create(username="u")
                for name in TENANTS
            }
            sessions.reset()
        for name in TENANTS:
            remove(name)


def at_once(work: Callable[[str], Any]) -> list[Any]:
    """Work for both tenants in requests of two threads."""

    def serve(name: str) -> Any:
        try:
            with tenant_of(name):
                return work(name)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(len(TENANTS)) as pool:
        return list(pool.map(serve, TENANTS))


def serve(main: Callable[[str], Coroutine[Any, Any, Any]]) -> list[Any]:
    """Work for both tenants in one event loop, as requests of an ASGI server."""

    async def request(name: str) -> Any:
        tenants.current.set(name)
        async with ThreadSensitiveContext():
            await sync_to_async(tenants.enter)(name)
            try:
                return await main(name)
            finally:
                await sync_to_async(tenants.close)()

    async def both() -> list[Any]:
        return await asyncio.gather(*map(request, TENANTS))

    # No session has been opened before in the thread of a server's loop.
    return contextvars.Context().run(asyncio.run, both())


def texts(items: list[Any]) -> list[str]:
    return [item["content"] for item in items]


def expected(*more: str) -> list[list[str]]:
    return [[f"{name} {word}" for word in more] for name in TENANTS]


@pytest.mark.parametrize("is_owned", [True, False])
def test_each_has_its_own_history(users: dict[str, Any], is_owned: bool) -> None:
    def session(name: str) -> Any:
        return get_session("chat", user=users[name] if is_owned else None)

    def first(name: str) -> list[str]:
        session(name).sync.add_items(says(f"{name} first"))
        return texts(session(name).sync.get_items())

    async def second(name: str) -> list[str]:
        await session(name).add_items(says(f"{name} second"))
        return texts(await session(name).get_items())

    def third(name: str) -> list[str]:
        async_to_sync(session(name).add_items)(says(f"{name} third"))
        return texts(async_to_sync(session(name).get_items)())

    assert at_once(first) == expected("first")
    assert serve(second) == expected("first", "second")
    assert at_once(third) == expected("first", "second", "third")
    assert at_once(lambda name: session(name).sync.pop_item()["content"]) == [
        f"{name} third" for name in TENANTS
    ]
    for name in TENANTS:
        assert AgentSession.objects.using(name).count() == 1


def test_what_one_removes_the_other_keeps(users: dict[str, Any]) -> None:
    async def write(name: str) -> None:
        await get_session("chat", user=users[name]).add_items(says(f"{name} first"))

    async def clear(name: str) -> list[str]:
        session = get_session("chat", user=users[name])
        if name == "one":
            await session.clear_session()
        return texts(await session.get_items())

    serve(write)
    assert serve(clear) == [[], ["two first"]]
    serve(write)
    AgentSession.objects.using("two").all().delete()
    assert serve(clear) == [[], []]
    AgentSession.objects.using("one").all().delete()
    assert at_once(
        lambda name: get_session("chat", user=users[name]).sync.get_items()
    ) == [[], []]


def test_counts_are_written_to_their_own_database(users: dict[str, Any]) -> None:
    def write(name: str) -> None:
        session: Any = get_session("chat", user=users[name])
        for number in range(3 if name == "one" else 5):
            session.sync.add_items(says(f"{name} {number}"))

    at_once(write)
    counts = [AgentSession.objects.using(name).get().item_count for name in TENANTS]
    assert counts == [3, 5]


def test_a_named_database_leaves_the_names_alone(store: dict[str, Any]) -> None:
    named = store["OPTIONS"] | {"database": "default"}
    names = []
    for options in (named, store["OPTIONS"]):
        setting = {"default": store | {"OPTIONS": options}}
        with override_settings(AGENT_SESSIONS=setting):
            backend: Any = sessions["default"]
            names.append(backend.database_mark)
            sessions.reset()
    assert names == ["", ""]


def test_runs_and_limits_are_apart(users: dict[str, Any]) -> None:
    def write(name: str) -> None:
        get_session("chat", user=users[name]).sync.add_items(says(name))

    async def find(name: str) -> tuple[Any, str]:
        found = await Conversation.find("chat", user=users[name])
        return place_of(found), group_of(found)

    def count(name: str) -> list[bool]:
        limit = RateLimit(f"runs {limits}", 1)
        return [limit.take(users[name].pk) for _ in range(2)]

    at_once(write)
    (one, first), (two, second) = serve(find)
    assert one[2:] == two[2:]
    assert one != two
    assert first != second
    limits = uuid.uuid4()
    assert at_once(count) == [[True, False]] * 2
