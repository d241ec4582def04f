"""Connections to PostgreSQL that the event loop awaits without a thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.transport.postgresql import PostgreSQLTransport
from agent_sessions.exceptions import LeaseLost, StorageError
from agent_sessions.models import AgentSession, SessionItem
from tests.settings import DATABASE_KIND

pytestmark = pytest.mark.django_db(transaction=True)
__test__ = DATABASE_KIND == "postgres"

ITEM: Any = {"role": "user", "content": "Hello"}
ITEMS = SessionItem._meta.db_table
SESSIONS = AgentSession._meta.db_table


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def sized(count: int) -> override_settings:
    """Set how many connections of a kind the test's backend has."""
    path = "agent_sessions.backends.database.DatabaseBackend"
    setting = {"default": {"BACKEND": path, "OPTIONS": {"threads": count}}}
    return override_settings(AGENT_SESSIONS=setting)


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


def transport() -> PostgreSQLTransport:
    found = backend().engine.transport
    assert isinstance(found, PostgreSQLTransport)
    return found


def open_now() -> list[Any]:
    """Return the connections that are idle, of all loops."""
    return [each for pool in transport()._pools.every() for each in pool._idle]


def server_ids() -> list[int]:
    return sorted(each.info.backend_pid for each in open_now())


def alive(ids: list[int]) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = ANY (%s)", [ids])
        return cursor.fetchone() is not None


def kill(ids: list[int]) -> None:
    with connection.cursor() as cursor:
        for each in ids:
            cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [each])
    connection.close()


def messages(count: int, size: int = 10) -> list[Any]:
    return [{"role": "user", "content": f"{n} {'x' * size}"} for n in range(count)]


async def warm(count: int = 1) -> Any:
    """Make calls until `count` connections of the loop serve them."""
    session = get_session("warm")
    for _ in range(9):
        await session.get_items(50)
        await session.add_items([ITEM])
    await asyncio.gather(*(session.get_items(50) for _ in range(count)))
    await session.clear_session()
    await session.add_items([ITEM])
    return session


def serve(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@contextmanager
def held(table: str) -> Iterator[threading.Event]:
    """Keep a table locked until the event is set, or the block ends."""
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            locked.set()
            release.wait(30)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(30)
    try:
        yield release
    finally:
        release.set()
        thread.join()


def test_turns_need_no_thread() -> None:
    async def main() -> None:
        session = await warm()
        backend().threads.close()
        for item in messages(5):
            await session.add_items([item])
        assert await session.get_items(50) == [ITEM, *messages(5)]
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("agent_sessions-")]

    serve(main)


def test_few_calls_open_no_further_connection() -> None:
    async def main() -> None:
        for _ in range(8):
            await get_session("few").add_items([ITEM])
            await get_session("few").get_items()
        assert open_now() == []

    serve(main)


def test_statements_are_prepared_and_plans_go_by_indexes() -> None:
    async def main() -> None:
        await warm()
        [found] = open_now()
        prepared = await found.execute(
            "SELECT count(*) FROM pg_prepared_statements WHERE generic_plans > 0 "
            "OR custom_plans > 0"
        )
        assert (await prepared.fetchone())[0] >= 2
        setting = await found.execute("SHOW enable_seqscan")
        assert await setting.fetchone() == ("off",)

    serve(main)


@sized(2)
def test_they_are_bounded_and_what_waits_is_served() -> None:
    names = [f"many-{number}" for number in range(8)]

    async def main() -> None:
        await warm(2)
        opened = server_ids()
        await asyncio.gather(*(get_session(name).add_items([ITEM]) for name in names))
        await asyncio.gather(
            *(
                get_session(name).add_items(messages(3))
                for name in names
                for _ in range(10)
            ),
            *(get_session(name).get_items(5) for name in names for _ in range(10)),
        )
        assert len(opened) == 2
        assert server_ids() == opened

    serve(main)
    for name in names:
        items = get_session(name).sync.get_items()
        assert items == [ITEM] + messages(3) * 10


def test_each_loop_has_its_own_and_takes_them_along() -> None:
    opened: list[int] = []

    def work(number: int) -> None:
        async def main() -> None:
            session = get_session(f"thread-{number}")
            for _ in range(15):
                await session.add_items([ITEM])
                await session.get_items(5)
            opened.extend(server_ids())

        asyncio.run(main())

    workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert SessionItem.objects.count() == 60
    assert opened
    assert open_now() == []
    gone(opened)


def gone(ids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while alive(ids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(ids)


def test_a_first_write_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []

    async def main() -> None:
        await warm()
        statements = backend().engine.statements
        batch = statements.batch

        def counted(items: Any) -> Any:
            encoded.append(items)
            return batch(items)

        monkeypatch.setattr(statements, "batch", counted)
        await get_session("new").add_items([ITEM])
        assert await get_session("new").get_items() == [ITEM]

    serve(main)
    assert len(encoded) == 1


def test_large_batches_and_long_histories() -> None:
    # More than a socket takes at once, either way.
    many = messages(50, 200_000)

    async def main() -> None:
        await warm()
        session = get_session("large")
        await session.add_items([ITEM])
        await session.add_items(many)
        assert await session.get_items(50) == many
        await session.add_items(messages(400))
        assert await session.get_items(300) == messages(400)[100:]
        assert await session.get_items() == [ITEM, *many, *messages(400)]

    serve(main)


def test_a_fork_is_read_across() -> None:
    async def main() -> None:
        await warm()
        session: Any = get_session("forked")
        await session.add_items(messages(6))
        await session.create_branch_from_turn(4, "other")
        await session.add_items([ITEM])
        expected = [*messages(3), ITEM]
        assert await session.get_items() == expected
        assert await session.get_items(2) == expected[-2:]
        assert await session.get_items(100) == expected

    serve(main)


def test_unreadable_rows_are_passed_over() -> None:
    async def main() -> None:
        await warm()
        session = get_session("unreadable")
        await session.add_items(messages(5))
        rows = SessionItem.objects.filter(branch__session__session_id="unreadable")
        await backend().threads.run(rows.filter(position=5).update, data="{")
        assert await session.get_items(2) == messages(4)[2:]
        assert await session.get_items() == messages(4)

    serve(main)


def test_a_lost_lease_is_told() -> None:
    async def main() -> None:
        await warm()
        with pytest.raises(LeaseLost):
            await backend().aappend(SessionKey("warm", fence=7), [ITEM])

    serve(main)
    assert AgentSession.objects.get(session_id="warm").item_count == 1


class TestCancelled:
    def test_a_read_is_let_go_at_once(self) -> None:
        async def main() -> None:
            session = await warm()
            with held(ITEMS):
                reading = asyncio.ensure_future(session.get_items(50))
                await asyncio.sleep(0.1)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(reading, 5)
            assert await session.get_items(50) == [ITEM]
            assert len(open_now()) == 1

        serve(main)

    def test_an_append_is_told_once_it_has_ended(self) -> None:
        async def main() -> None:
            session = await warm()
            with held(SESSIONS) as release:
                writing = asyncio.ensure_future(session.add_items([ITEM]))
                await asyncio.sleep(0.1)
                writing.cancel()
                await asyncio.sleep(0.1)
                assert not writing.done()
                release.set()
                with pytest.raises(asyncio.CancelledError):
                    await writing
            assert len(await session.get_items()) == 2

        serve(main)

    @sized(1)
    def test_one_that_waits_for_a_connection_writes_nothing(self) -> None:
        async def main() -> None:
            session = await warm()
            with held(SESSIONS) as release:
                first, second, third = (
                    asyncio.ensure_future(session.add_items([ITEM])) for _ in range(3)
                )
                await asyncio.sleep(0.1)
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(second, 5)
                release.set()
                await asyncio.gather(first, third)
            assert len(await session.get_items()) == 3
            assert len(open_now()) == 1

        serve(main)


class TestServerHangsUp:
    def test_the_next_call_works(self) -> None:
        async def main() -> None:
            session = await warm(2)
            killed = server_ids()
            await asyncio.to_thread(kill, killed)
            for _ in range(4):
                await session.add_items([ITEM])
            assert len(await session.get_items()) == 5
            assert not set(server_ids()) & set(killed)

        serve(main)

    def test_a_call_under_way_fails_and_the_next_works(self) -> None:
        async def main() -> None:
            session = await warm()
            killed = server_ids()
            with held(SESSIONS):
                writing = asyncio.ensure_future(session.add_items([ITEM]))
                await asyncio.sleep(0.1)
                await asyncio.to_thread(kill, killed)
                with pytest.raises(StorageError, match="refused"):
                    await writing
            await session.add_items([ITEM])
            assert len(await session.get_items()) == 2

        serve(main)


class TestGivenUp:
    def test_behind_a_pooler_that_changes_the_connection(self) -> None:
        async def main() -> None:
            session = await warm()
            [found] = open_now()
            found.pgconn.exec_(b"SELECT 1")
            # As a pooler does that hands out another connection to the server.
            with found.wrapper.connection.cursor() as cursor:
                cursor.execute("DEALLOCATE ALL")
            await session.add_items([ITEM])
            assert transport()._is_refused
            await session.add_items([ITEM])
            assert len(await session.get_items()) == 3

        serve(main)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("DISABLE_SERVER_SIDE_CURSORS", True), ("OPTIONS", {"pool": {}})],
    )
    def test_where_settings_tell_of_a_pooler(
        self, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        value = {"pool": {"max_size": 9}} if name == "OPTIONS" else value
        monkeypatch.setitem(connection.settings_dict, name, value)
        assert backend().engine.transport is None

    def test_in_a_callers_transaction(self) -> None:
        session = get_session("atomic")
        with transaction.atomic():
            for _ in range(20):
                asyncio.run(session.add_items([ITEM]))
            assert len(asyncio.run(session.get_items())) == 20
            transaction.set_rollback(True)
        assert asyncio.run(session.get_items()) == []


@sized(1)
def test_close_leaves_none_at_the_server() -> None:
    opened: list[int] = []

    async def main() -> None:
        session = await warm()
        opened.extend(server_ids())
        with held(SESSIONS) as release:
            writing = [
                asyncio.ensure_future(session.add_items([ITEM])) for _ in range(2)
            ]
            await asyncio.sleep(0.1)
            sessions["default"].close()
            release.set()
            await asyncio.gather(*writing)
        assert len(await session.get_items()) == 3

    serve(main)
    assert opened
    gone(opened)


FORKING = """
import asyncio, os
import django
django.setup()
from django.db import connections
from tests.backends.database.test_transport_postgresql import open_now, server_ids, warm

loop = asyncio.new_event_loop()
session = loop.run_until_complete(warm())
opened = server_ids()
assert opened
# As servers that fork do: the parent's thread keeps no connection across it.
connections.close_all()
child = os.fork()
if not child:
    async def main():
        await warm()
        assert server_ids() and not set(server_ids()) & set(opened)

    asyncio.run(main())
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
# The child must not have closed or used the parent's sockets.
async def more():
    await session.add_items([{"role": "user", "content": "Hello"}])
    assert server_ids() == opened

loop.run_until_complete(more())
loop.run_until_complete(loop.shutdown_asyncgens())
loop.close()
assert not open_now()
"""


def test_a_fork_gets_connections_of_its_own(
    database_environment: dict[str, str],
) -> None:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads, which is the point.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING],
        env=database_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
