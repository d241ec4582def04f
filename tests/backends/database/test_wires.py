"""Connections to PostgreSQL that the event loop awaits without a thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.exceptions import LeaseLost, StorageError
from agent_sessions.models import AgentSession, SessionItem
from tests.settings import DATABASE_KIND
from tests.support.wires import ITEM, make_ready, wires

pytestmark = pytest.mark.django_db(transaction=True)
__test__ = DATABASE_KIND == "postgres"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def sized(count: int) -> override_settings:
    """Give the test's backend this many connections of a kind."""
    path = "agent_sessions.backends.database.DatabaseBackend"
    setting = {"default": {"BACKEND": path, "OPTIONS": {"threads": count}}}
    return override_settings(AGENT_SESSIONS=setting)


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


def messages(count: int, size: int = 10) -> list[Any]:
    return [{"role": "user", "content": f"{n} {'x' * size}"} for n in range(count)]


def pool_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("agent_sessions-") and "opener" not in thread.name
    ]


def on_wires(function: Callable[[Any], Any]) -> list[Any]:
    """Call a function with a cursor of each connection, and give what it gives."""

    def call() -> list[Any]:
        found = []
        for wire in wires()._wires:
            with wire.connection.cursor() as cursor:
                found.append(function(cursor))
        return found

    return asyncio.run(asyncio.to_thread(call))


def server_ids() -> list[int]:
    def ask(cursor: Any) -> int:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])

    return on_wires(ask)


def kill(ids: list[int]) -> None:
    with connection.cursor() as cursor:
        for each in ids:
            cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [each])


@contextmanager
def held(table: str, mode: str = "ACCESS EXCLUSIVE") -> Iterator[threading.Event]:
    """Keep a table locked until the event is set, or the block ends."""
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN {mode} MODE")
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


ITEMS = SessionItem._meta.db_table
SESSIONS = AgentSession._meta.db_table


def test_turns_need_no_thread() -> None:
    make_ready()
    session = get_session("warm")
    asyncio.run(session.add_items([ITEM]))
    # Now it is known that the branch has no ancestors.
    asyncio.run(session.get_items(50))
    backend().threads.close()

    async def main() -> list[Any]:
        for item in messages(5):
            await session.add_items([item])
        return await session.get_items(50)

    assert asyncio.run(main()) == [ITEM, *messages(5)]
    assert pool_threads() == []


def test_few_calls_open_no_further_connection() -> None:
    session = get_session("few")
    for _ in range(4):
        asyncio.run(session.add_items([ITEM]))
        asyncio.run(session.get_items())
    assert wires()._wires == []


@sized(2)
def test_they_are_bounded_and_what_waits_is_served() -> None:
    make_ready(2)
    opened = server_ids()
    names = [f"many-{number}" for number in range(8)]

    async def main() -> None:
        one_each = [get_session(name).add_items([ITEM]) for name in names]
        await asyncio.gather(*one_each)
        await asyncio.gather(
            *(
                get_session(name).add_items(messages(3))
                for name in names
                for _ in range(10)
            ),
            *(get_session(name).get_items(5) for name in names for _ in range(10)),
        )

    asyncio.run(main())
    assert len(opened) == 2
    assert sorted(server_ids()) == sorted(opened)
    for name in names:
        items = get_session(name).sync.get_items()
        assert items == [ITEM] + messages(3) * 10


def test_loops_in_several_threads_share_them() -> None:
    make_ready(2)
    done = []

    def work(number: int) -> None:
        async def main() -> None:
            session = get_session(f"thread-{number}")
            for _ in range(30):
                await session.add_items([ITEM])
                await session.get_items(5)

        asyncio.run(main())
        done.append(number)

    workers = [threading.Thread(target=work, args=[number]) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(done) == 6
    assert SessionItem.objects.count() == 180
    assert len(wires()._wires) <= 8


def test_large_batches_and_long_histories() -> None:
    make_ready()
    session = get_session("large")
    # More than a socket takes at once, either way.
    many = messages(50, 200_000)

    async def main() -> None:
        await session.add_items([ITEM])
        await session.add_items(many)
        assert await session.get_items(50) == many
        await session.add_items(messages(400))
        assert await session.get_items(300) == messages(400)[100:]
        assert await session.get_items() == [ITEM, *many, *messages(400)]

    asyncio.run(main())


def test_a_fork_is_read_across() -> None:
    make_ready()
    session: Any = get_session("forked")

    async def main() -> None:
        await session.add_items(messages(6))
        await session.create_branch_from_turn(4, "other")
        await session.add_items([ITEM])
        expected = [*messages(3), ITEM]
        assert await session.get_items() == expected
        assert await session.get_items(2) == expected[-2:]
        assert await session.get_items(100) == expected

    asyncio.run(main())


def test_unreadable_rows_are_passed_over() -> None:
    make_ready()
    session = get_session("unreadable")
    asyncio.run(session.add_items(messages(5)))
    SessionItem.objects.filter(position=5).update(data="{")
    assert asyncio.run(session.get_items(2)) == messages(4)[2:]
    assert asyncio.run(session.get_items()) == messages(4)


def test_a_lost_lease_is_told() -> None:
    make_ready()
    asyncio.run(get_session("leased").add_items([ITEM]))
    with pytest.raises(LeaseLost):
        asyncio.run(backend().aappend(SessionKey("leased", fence=7), [ITEM]))
    assert AgentSession.objects.get(session_id="leased").item_count == 1


class TestCancelled:
    def test_a_read_is_let_go_at_once_and_its_connection_later(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))

        async def main() -> None:
            with held(ITEMS) as release:
                reading = asyncio.ensure_future(session.get_items(50))
                await asyncio.sleep(0.1)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(reading, 5)
                release.set()
            assert await session.get_items(50) == [ITEM]

        free = wires().free
        asyncio.run(main())
        assert wires().free == free

    def test_an_append_is_told_once_it_has_ended(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))

        async def main() -> None:
            with held(SESSIONS) as release:
                writing = asyncio.ensure_future(session.add_items([ITEM]))
                await asyncio.sleep(0.1)
                writing.cancel()
                await asyncio.sleep(0.1)
                assert not writing.done()
                release.set()
                with pytest.raises(asyncio.CancelledError):
                    await writing

        asyncio.run(main())
        assert len(session.sync.get_items()) == 2

    @sized(1)
    def test_one_that_waits_for_a_connection_writes_nothing(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))

        async def main() -> None:
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

        asyncio.run(main())
        assert len(session.sync.get_items()) == 3
        assert wires().free == 1

    @sized(1)
    def test_one_that_is_just_given_a_connection_gives_it_back(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))

        async def main() -> None:
            for _ in range(200):
                tasks = [asyncio.ensure_future(session.get_items(1)) for _ in range(4)]
                await tasks[0]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert await session.get_items(1) == [ITEM]

        asyncio.run(asyncio.wait_for(main(), 60))
        asyncio.run(session.get_items(1))
        assert wires().free == 1

    @sized(1)
    def test_a_loop_that_ended_meanwhile_keeps_none(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))
        with held(ITEMS):
            loop = asyncio.new_event_loop()
            reading = loop.create_task(session.get_items(50))
            loop.run_until_complete(asyncio.sleep(0.1))
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                loop.run_until_complete(reading)
            # As asyncio.run() would: what the server says then, nobody reads.
            loop.close()
            assert wires().free == 0
            with pytest.raises(TimeoutError):
                asyncio.run(asyncio.wait_for(session.get_items(50), 0.3))
        assert asyncio.run(session.get_items(50)) == [ITEM]
        deadline = time.monotonic() + 30
        while not wires().free and time.monotonic() < deadline:
            time.sleep(0.02)
        assert asyncio.run(session.get_items(50)) == [ITEM]
        assert wires().free == 1


class TestServerHangsUp:
    def test_the_next_call_works(self) -> None:
        make_ready(2)
        session = get_session("warm")
        killed = server_ids()
        kill(killed)
        for _ in range(4):
            asyncio.run(session.add_items([ITEM]))
        make_ready(2)
        assert not set(server_ids()) & set(killed)

    def test_a_call_under_way_fails_and_the_next_works(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))
        killed = server_ids()

        async def main() -> None:
            with held(SESSIONS):
                writing = asyncio.ensure_future(session.add_items([ITEM]))
                await asyncio.sleep(0.1)
                await asyncio.to_thread(kill_here, killed)
                with pytest.raises(StorageError, match="refused"):
                    await writing
            await session.add_items([ITEM])

        def kill_here(ids: list[int]) -> None:
            kill(ids)
            connection.close()

        asyncio.run(main())
        assert len(session.sync.get_items()) == 2

    def test_what_the_server_refuses_is_told(self) -> None:
        make_ready()
        on_wires(
            lambda cursor: cursor.execute("SET default_transaction_read_only = on")
        )
        with pytest.raises(StorageError):
            asyncio.run(get_session("warm").add_items([ITEM]))
        assert wires().prepared.enabled


class TestGivenUp:
    def test_behind_a_pooler_that_changes_the_connection(self) -> None:
        make_ready()
        session = get_session("warm")
        on_wires(lambda cursor: cursor.execute("DEALLOCATE ALL"))
        asyncio.run(session.add_items([ITEM]))
        assert not wires().prepared.enabled
        asyncio.run(session.add_items([ITEM]))
        assert len(asyncio.run(session.get_items())) == 2

    def test_behind_a_pooler_that_django_knows_of(self) -> None:
        settings = connection.settings_dict
        settings["DISABLE_SERVER_SIDE_CURSORS"] = True
        try:
            for _ in range(40):
                asyncio.run(get_session("pooled").add_items([ITEM]))
        finally:
            del settings["DISABLE_SERVER_SIDE_CURSORS"]
        assert wires()._wires == []

    def test_with_djangos_own_pool(self) -> None:
        options = connection.settings_dict["OPTIONS"]
        options["pool"] = {"max_size": 8}
        try:
            assert backend().engine.wires is None
        finally:
            del options["pool"]

    def test_in_a_callers_transaction(self) -> None:
        make_ready()
        session = get_session("warm")
        with transaction.atomic():
            asyncio.run(session.add_items([ITEM]))
            assert len(asyncio.run(session.get_items())) == 1
            transaction.set_rollback(True)
        assert asyncio.run(session.get_items()) == []


class TestClosed:
    def test_while_one_is_made_ready(self) -> None:
        session = get_session("warm")

        async def main() -> None:
            for _ in range(16):
                await session.add_items([ITEM])
            for _ in range(10):
                await session.get_items(50)
                sessions["default"].close()

        asyncio.run(main())
        made = wires()
        for _ in range(20):
            make_ready()
            made.close()
        assert len(session.sync.get_items()) == 0

    def test_none_is_left_at_the_server(self) -> None:
        make_ready(2)
        opened = server_ids()
        sessions["default"].close()
        deadline = time.monotonic() + 10
        while alive(opened) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(opened)
        assert asyncio.run(get_session("warm").get_items()) == []

    @sized(1)
    def test_while_one_is_at_work_and_another_waits(self) -> None:
        make_ready()
        session = get_session("warm")
        asyncio.run(session.add_items([ITEM]))
        opened = server_ids()

        async def main() -> None:
            with held(SESSIONS) as release:
                writing = [
                    asyncio.ensure_future(session.add_items([ITEM])) for _ in range(2)
                ]
                await asyncio.sleep(0.1)
                sessions["default"].close()
                release.set()
                await asyncio.gather(*writing)

        asyncio.run(asyncio.wait_for(main(), 30))
        assert len(session.sync.get_items()) == 3
        deadline = time.monotonic() + 10
        while alive(opened) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(opened)


def alive(ids: list[int]) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = ANY (%s)", [ids])
        return cursor.fetchone() is not None


FORKING = """
import asyncio, os
import django
django.setup()
from agent_sessions import get_session
from django.db import connections
from tests.support.wires import ITEM, make_ready, wires

make_ready()
session = get_session("forked")
asyncio.run(session.add_items([ITEM]))
opened = list(wires()._wires)
# As servers that fork do: the parent's thread keeps no connection across it.
connections.close_all()
child = os.fork()
if not child:
    make_ready()
    assert not set(wires()._wires) & set(opened)
    asyncio.run(session.add_items([ITEM]))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
# The child must not have closed or used the parent's sockets.
asyncio.run(session.add_items([ITEM]))
assert wires()._wires == opened
assert len(asyncio.run(session.get_items())) == 3
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
