"""What goes wrong with a Redis server: named errors, nothing half-written, recovery."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from agent_sessions import RedisSession
from agent_sessions.backends.redis import RedisBackend
from agent_sessions.backends.redis.scripts import Names
from agent_sessions.exceptions import (
    StorageError,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreUnavailable,
    WrongKeyType,
)
from tests.servers import Server
from tests.servers.mortal import mortal
from tests.servers.process import HOST, free_port
from tests.servers.redis import DURABLE, PASSWORD, Watched, _wait, recipe, url
from tests.servers.redis import redis as run_redis

pytestmark = pytest.mark.one_database

MESSAGES: list[Any] = [{"role": "user", "content": f"item {n}"} for n in range(3)]
SECRET = "what nobody may read in a log"
OPERATIONS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "add": lambda session: session.add_items([{"role": "user", "content": SECRET}]),
    "get": lambda session: session.get_items(),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
    "page": lambda session: session.backend.apage(session.key),
}
WRITES = {name: OPERATIONS[name] for name in ("add", "pop", "clear")}


def open_session(place: str, session_id: str = "", **options: Any) -> RedisSession:
    return RedisSession.from_url(session_id or uuid.uuid4().hex, place, **options)


def names(session: Any) -> Names:
    backend: RedisBackend = session.backend
    return backend.names(session.key)


async def refused(
    session: Any, operation: Callable[[Any], Awaitable[Any]], kind: type[StorageError]
) -> str:
    """Assert that an operation fails by this very error; give its words."""
    with pytest.raises(StorageError) as caught:
        await operation(session)
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "nth", range(5), ids=["items", "notes", "times", "calls", "answers"]
)
@pytest.mark.parametrize("operation", WRITES.values(), ids=WRITES)
async def test_a_key_of_another_kind_is_left_alone(
    redis_server: Server, nth: int, operation: Callable[[Any], Awaitable[Any]]
) -> None:
    session = open_session(url(redis_server))
    await session.add_items(MESSAGES)
    with redis.Redis(port=redis_server.port) as link:
        key = names(session).keys[nth]
        link.delete(key)
        link.xadd(key, {"not": "ours"})
        before = _dump(link, session)
        await refused(session, operation, WrongKeyType)
        assert _dump(link, session) == before


async def test_reading_another_kind_of_key_is_an_error(redis_server: Server) -> None:
    session = open_session(url(redis_server))
    with redis.Redis(port=redis_server.port) as link:
        link.set(names(session).items, "a text")
    await refused(session, OPERATIONS["get"], WrongKeyType)
    await refused(session, OPERATIONS["page"], WrongKeyType)


def _dump(link: Any, session: Any) -> list[Any]:
    return [link.dump(key) for key in names(session).keys]


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_a_full_server_takes_no_items_but_frees_them(kind: str) -> None:
    """Its memory is full: appends fail whole, and clearing makes room."""
    with run_redis(kind) as server, redis.Redis(port=server.port) as link:
        session = open_session(url(server))
        await session.add_items(MESSAGES)
        link.config_set("maxmemory", "1")
        before = _dump(link, session)
        assert "maxmemory" in await refused(session, OPERATIONS["add"], StoreFull)
        batch: list[Any] = [{"n": n} for n in range(3_000)]
        await refused(session, lambda s: s.add_items(batch), StoreFull)
        assert _dump(link, session) == before
        assert await session.get_items() == MESSAGES
        assert await session.pop_item() == MESSAGES[-1]
        await session.clear_session()
        assert await session.get_items() == []
        link.config_set("maxmemory", "0")
        await session.add_items(MESSAGES)
        assert await session.get_items() == MESSAGES
        await session.close()


@pytest.mark.parametrize("operation", WRITES.values(), ids=WRITES)
async def test_a_replica_takes_no_writes(
    redis_server: Server, operation: Callable[[Any], Awaitable[Any]]
) -> None:
    with run_redis("redis") as server, redis.Redis(port=server.port) as link:
        session = open_session(url(server))
        await session.add_items(MESSAGES)
        # Of a primary that isn't there: it goes on serving what it has.
        link.replicaof(HOST, free_port())
        before = _dump(link, session)
        await refused(session, operation, StoreReadOnly)
        assert await session.get_items() == MESSAGES
        assert _dump(link, session) == before
        link.replicaof("NO", "ONE")
        await operation(session)


async def test_a_password_is_asked_for() -> None:
    with run_redis("redis", "--requirepass", PASSWORD) as server:
        place = url(server).replace("//", f"//:{PASSWORD}@")
        good = open_session(place)
        await good.add_items(MESSAGES)
        for operation in OPERATIONS.values():
            await refused(open_session(url(server)), operation, StoreRefused)
        wrong = open_session(url(server).replace("//", "//:guess@"))
        assert "password" in await refused(wrong, OPERATIONS["add"], StoreRefused)
        with redis.Redis(port=server.port, password=PASSWORD) as link:
            link.acl_setuser("reader", enabled=True, nopass=True, categories=["+@read"])
        reader = open_session(url(server).replace("//", "//reader:x@"))
        assert "ACL" in await refused(reader, OPERATIONS["add"], StoreRefused)
        await good.close()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
async def test_a_server_that_is_not_there(
    operation: Callable[[Any], Awaitable[Any]],
) -> None:
    place = f"redis://user:{PASSWORD}@{HOST}:{free_port()}/0"
    session = open_session(place, redis_kwargs={"retry": None})
    await refused(session, operation, StoreUnavailable)
    assert not await session.ping()
    assert PASSWORD not in repr(session) + repr(session.backend)
    assert PASSWORD not in repr(session.backend.endpoint)  # type: ignore[attr-defined]


def test_a_server_that_is_not_there_for_sync_callers() -> None:
    session = open_session(f"redis://{HOST}:{free_port()}/0")
    with pytest.raises(StoreUnavailable, match="reached"):
        session.sync.get_items()
    session.backend.close()


async def test_a_cluster_that_is_not_there() -> None:
    session = open_session(f"redis://{HOST}:{free_port()}/0", cluster=True)
    await refused(session, OPERATIONS["add"], StoreUnavailable)


SLIDING: dict[str, Any] = {"ttl": 60}
REFUSALS = {
    "no_replicas": lambda link: link.config_set("min-replicas-to-write", 3),
    "replica": lambda link: link.replicaof(HOST, 1),
    "full": lambda link: link.config_set("maxmemory", "1"),
}


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("kind", ["redis", "valkey"])
@pytest.mark.parametrize("fence", [None, 7])
async def test_reading_needs_no_write(
    kind: str, refuse: Callable[[Any], Any], fence: int | None
) -> None:
    """A sliding ttl and a lease are written down where the server takes it."""
    with run_redis(kind) as server, redis.Redis(port=server.port) as link:
        session = open_session(url(server), **SLIDING)
        await session.add_items(MESSAGES)
        refuse(link)
        backend: RedisBackend = session.backend  # type: ignore[assignment]
        key = session.key.fenced(fence)
        assert await backend.alatest(key, None) == MESSAGES
        assert await backend.alatest(key, 2) == MESSAGES[-2:]
        page = await backend.apage(key)
        assert [stored.item for stored in page.items] == MESSAGES
        await session.close()


async def test_a_server_that_cannot_save_is_read(tmp_path: Path) -> None:
    arguments = ("--dir", str(tmp_path))
    with run_redis("redis", *arguments) as server:
        session = open_session(url(server), **SLIDING)
        await session.add_items(MESSAGES)
        with redis.Redis(port=server.port) as link:
            link.config_set("save", "3600 1")
            (tmp_path / "dump.rdb").mkdir()
            link.bgsave()
            await asyncio.to_thread(_wait, lambda: _cannot_save(link), "a failed save")
        await refused(session, OPERATIONS["add"], StoreFull)
        assert await session.get_items() == MESSAGES
        await session.close()


def _cannot_save(link: Any) -> bool:
    return bool(link.info("persistence")["rdb_last_bgsave_status"] == "err")


# What docs/redis.md asks an ACL to allow.
COMMANDS = re.findall(
    r"\+([a-z|]+)", Path("docs/redis.md").read_text().partition("### An ACL")[2]
)


@pytest.mark.parametrize("kind", ["redis", "valkey"])
@pytest.mark.parametrize("session_id", ["plain", "a{b}c", "a}b", "{", "{}x"])
async def test_an_acl_by_prefix_suffices(kind: str, session_id: str) -> None:
    with run_redis(kind) as server, redis.Redis(port=server.port) as link:
        rights = [f"+{command}" for command in COMMANDS]
        link.execute_command(
            *("ACL", "SETUSER", "anna", "on", f">{PASSWORD}", "~agents:session*"),
            *rights,
        )
        place = f"redis://anna:{PASSWORD}@{HOST}:{server.port}/0"
        session = open_session(place, session_id, **SLIDING, max_items=50)
        await session.add_items(MESSAGES)
        assert await session.get_items() == MESSAGES
        assert await session.pop_item() == MESSAGES[-1]
        page = await session.backend.apage(session.key)
        assert len(page.items) == 2
        found = [each async for each in session.backend.store_ids()]  # type: ignore[attr-defined]
        assert found == [session_id]
        await session.clear_session()
        assert await session.get_items() == []
        assert await session.ping()
        await session.close()


@pytest.mark.parametrize("kind", ["redis", "valkey"])
@pytest.mark.parametrize("command", ["evalsha", "rpush", "lrange"])
async def test_a_refused_command_is_named(kind: str, command: str) -> None:
    with run_redis(kind) as server, redis.Redis(port=server.port) as link:
        link.execute_command(
            *("ACL", "SETUSER", "anna", "on", f">{PASSWORD}", "~*", "+@all"),
            f"-{command}",
        )
        place = f"redis://anna:{PASSWORD}@{HOST}:{server.port}/0"
        operation = OPERATIONS["get" if command == "lrange" else "add"]
        told = await refused(open_session(place), operation, StoreRefused)
        assert command.upper() in told
        assert "docs/redis.md" in told


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_a_server_that_refuses_hello_is_spoken_to_in_resp2(kind: str) -> None:
    with run_redis(kind) as server, redis.Redis(port=server.port) as link:
        for user in ("default", "anna"):
            link.execute_command(
                *("ACL", "SETUSER", user, "on", f">{PASSWORD}", "~*", "+@all"), "-hello"
            )
        place = f"redis://anna:{PASSWORD}@{HOST}:{server.port}/0"
        session = open_session(place, redis_kwargs={"protocol": 2})
        await session.add_items(MESSAGES)
        assert await session.get_items() == MESSAGES
        await session.close()


async def test_a_refused_key_is_told() -> None:
    with run_redis() as server, redis.Redis(port=server.port) as link:
        link.execute_command(
            *("ACL", "SETUSER", "anna", "on", f">{PASSWORD}", "~other:*", "+@all")
        )
        place = f"redis://anna:{PASSWORD}@{HOST}:{server.port}/0"
        told = await refused(open_session(place), OPERATIONS["add"], StoreRefused)
        assert "a key" in told
        assert "key_prefix" in told


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_a_server_is_killed_in_mid_write(kind: str) -> None:
    """What was acknowledged is there, the rest was an error, and work goes on.

    The same session object, in the same process and loop, writes again as soon as the
    server is back.
    """
    acknowledged: list[str] = []
    failed: list[str] = []
    begun = asyncio.Event()

    async def write(writer: int) -> None:
        number = 0
        while not failed:
            name = f"{writer}.{number}"
            batch: list[Any] = [{"batch": name, "n": n} for n in range(4)]
            try:
                await session.add_items(batch)
            except StoreUnavailable:
                failed.append(name)
            else:
                acknowledged.append(name)
            if len(acknowledged) > 40:
                begun.set()
            number += 1

    with mortal(recipe(kind, *DURABLE)) as server:
        session = open_session(f"redis://{HOST}:{server.port}/0")
        writers = [asyncio.create_task(write(number)) for number in range(4)]
        await begun.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.gather(*writers)
        assert failed
        await asyncio.to_thread(server.start)
        found: list[Any] = await session.get_items()
        stored = [item["batch"] for item in found[::4]]
        assert found == [{"batch": name, "n": n} for name in stored for n in range(4)]
        assert len(set(stored)) == len(stored)
        assert set(acknowledged) <= set(stored) <= {*acknowledged, *failed}
        await session.add_items(MESSAGES)
        assert await session.get_items(limit=3) == MESSAGES
        await session.close()


async def test_a_restart_is_bridged() -> None:
    """A server that is back within a moment costs no error at all."""
    with mortal(recipe("redis", *DURABLE)) as server:
        session = open_session(f"redis://{HOST}:{server.port}/0")
        await session.add_items(MESSAGES)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await session.add_items(MESSAGES)
        assert await session.get_items() == MESSAGES * 2
        await session.close()


async def test_a_failover_keeps_what_was_acknowledged(
    valkey_sentinel: Watched,
) -> None:
    """The sentinels name the new primary, and the same object goes on writing."""
    from django.test import override_settings

    from tests.backends.redis.test_redis_contract import sentinel_cache

    with override_settings(CACHES={"default": sentinel_cache(valkey_sentinel)}):
        session = RedisSession.from_cache(uuid.uuid4().hex, key_prefix="failover")
        await session.add_items(MESSAGES)
        before = valkey_sentinel.primary()
        await asyncio.to_thread(valkey_sentinel.fail_over)
        assert valkey_sentinel.primary() != before
        for _ in range(40):
            try:
                await session.add_items(MESSAGES[:1])
                break
            except StorageError:
                # Until the old primary has heard that it is none.
                await asyncio.sleep(0.25)
        assert await session.get_items() == [*MESSAGES, MESSAGES[0]]
        await session.close()
