"""Which thread and connection a coroutine's statements run on."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync
from django.db import connection, connections, transaction
from django.test.utils import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.concurrency.threads import DatabaseThreads
from agent_sessions.exceptions import StorageError
from agent_sessions.models import AgentSession
from tests.settings import DATABASE_KIND

ITEM: Any = {"role": "user", "content": "Hello"}
# How many threads a pool has unless OPTIONS says otherwise.
DEFAULT_SIZE = 1 if DATABASE_KIND == "sqlite" else 8

_asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="nobody")


@pytest.fixture(autouse=True)
def _fresh_threads() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def threads() -> DatabaseThreads:
    backend = sessions["default"]
    assert isinstance(backend, DatabaseBackend)
    return backend.threads


def server_ids() -> list[int]:
    """Ask the server which of its clients the pool's connections are."""
    asking = {
        "postgres": "SELECT pg_backend_pid()",
        "mariadb": "SELECT CONNECTION_ID()",
    }[DATABASE_KIND]
    # A thread that is done early would answer for another.
    every = threading.Barrier(DEFAULT_SIZE)

    def ask() -> int:
        with connections["default"].cursor() as cursor:
            cursor.execute(asking)
            every.wait(30)
            return int(cursor.fetchone()[0])

    async def main() -> list[int]:
        together = asyncio.gather(*(threads().run(ask) for _ in range(DEFAULT_SIZE)))
        return sorted(set(await together))

    return asyncio.run(main())


def open_connections() -> int:
    """Count the test database's clients, without the one that asks."""
    with connection.cursor() as cursor:
        if DATABASE_KIND == "postgres":
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = "
                "current_database() AND pid != pg_backend_pid()"
            )
        else:
            cursor.execute(
                "SELECT count(*) FROM information_schema.processlist WHERE db = "
                "DATABASE() AND id != CONNECTION_ID()"
            )
        return int(cursor.fetchone()[0])


def wait_for_one_that_waits() -> None:
    """Return once the server says that a client waits for a row."""
    asking = {
        "postgres": "SELECT count(*) FROM pg_stat_activity WHERE datname = "
        "current_database() AND wait_event_type = 'Lock'",
        "mariadb": "SELECT count(*) FROM information_schema.innodb_trx "
        "WHERE trx_state = 'LOCK WAIT'",
    }[DATABASE_KIND]
    deadline = time.monotonic() + 30
    with connection.cursor() as cursor:
        while True:
            cursor.execute(asking)
            if cursor.fetchone()[0]:
                return
            assert time.monotonic() < deadline
            # MariaDB looks anew only when nobody has asked for a tenth of a second.
            time.sleep(0.2)


def sized(count: int) -> override_settings:
    """Set the number of threads of the test's pool."""
    path = "agent_sessions.backends.database.DatabaseBackend"
    setting = {"default": {"BACKEND": path, "OPTIONS": {"threads": count}}}
    return override_settings(AGENT_SESSIONS=setting)


@pytest.mark.django_db(transaction=True)
class TestPool:
    def test_it_is_bounded_and_not_the_loops_thread(self) -> None:
        seen: set[int] = set()

        def note() -> int:
            seen.add(threading.get_ident())
            time.sleep(0.02)
            return threading.get_ident()

        async def main() -> None:
            await asyncio.gather(*(threads().run(note) for _ in range(40)))

        asyncio.run(main())
        assert len(seen) == DEFAULT_SIZE
        assert threading.get_ident() not in seen

    @sized(3)
    def test_its_size_is_an_option(self) -> None:
        seen: set[int] = set()

        def note() -> None:
            seen.add(threading.get_ident())
            time.sleep(0.02)

        async def main() -> None:
            await asyncio.gather(*(threads().run(note) for _ in range(20)))

        asyncio.run(main())
        assert len(seen) == 3

    def test_a_slow_call_does_not_hold_up_the_loop(self) -> None:
        async def main() -> int:
            slow = asyncio.ensure_future(threads().run(time.sleep, 0.2))
            beats = 0
            while not slow.done():
                await asyncio.sleep(0.01)
                beats += 1
            return beats

        assert asyncio.run(main()) >= 5

    def test_context_variables_go_along(self) -> None:
        async def main() -> str:
            _asker.set("me")
            return await threads().run(_asker.get)

        assert asyncio.run(main()) == "me"

    @sized(1)
    def test_a_connection_serves_many_calls_with_max_age_zero(self) -> None:
        assert connection.settings_dict["CONN_MAX_AGE"] == 0
        session = get_session("kept")

        def held() -> Any:
            return connections["default"].connection

        async def main() -> tuple[Any, Any]:
            await session.add_items([ITEM])
            before = await threads().run(held)
            for _ in range(4):
                await session.add_items([ITEM])
                await session.get_items()
            return before, await threads().run(held)

        before, after = asyncio.run(main())
        assert before is not None
        assert before is after

    def test_it_serves_loop_after_loop(self) -> None:
        session = get_session("loops")
        for _ in range(3):
            asyncio.run(session.add_items([ITEM]))
        assert len(asyncio.run(session.get_items())) == 3

    def test_close_ends_its_threads_and_connections(self) -> None:
        asyncio.run(get_session("closed").add_items([ITEM]))
        pool = threads()
        opened = [seat.connection for seat in pool._seats.values() if seat.connection]
        name = f"agent_sessions-{pool.database}"
        assert opened
        pool.close()
        assert all(each.connection is None for each in opened)
        assert not [t for t in threading.enumerate() if t.name.startswith(name)]
        assert len(asyncio.run(get_session("closed").get_items())) == 1

    def test_close_may_be_called_from_a_coroutine(self) -> None:
        async def main() -> None:
            await get_session("closed").add_items([ITEM])
            sessions["default"].close()
            await get_session("closed").add_items([ITEM])

        asyncio.run(main())
        assert AgentSession.objects.get().item_count == 2


@pytest.mark.django_db(transaction=True)
class TestServerHangsUp:
    """The server restarts, or ends connections that were idle for long."""

    __test__ = DATABASE_KIND != "sqlite"

    def test_close_leaves_no_connection_at_the_server(self) -> None:
        before = open_connections()
        server_ids()
        assert open_connections() > before
        threads().close()
        deadline = time.monotonic() + 10
        while open_connections() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert open_connections() == before

    def test_the_next_call_works(self) -> None:
        session = get_session("survivor")
        asyncio.run(session.add_items([ITEM]))
        killed = server_ids()
        self.kill(killed)

        async def main() -> list[Any]:
            await asyncio.gather(*(session.add_items([ITEM]) for _ in range(20)))
            return await session.get_items()

        assert len(asyncio.run(main())) == 21
        assert not set(server_ids()) & set(killed)

    def test_a_call_under_way_fails_and_the_next_works(self) -> None:
        session = get_session("survivor")
        asyncio.run(session.add_items([ITEM]))
        killed = server_ids()

        def kill_while_it_waits() -> None:
            with transaction.atomic():
                list(AgentSession.objects.select_for_update())
                locked.set()
                wait_for_one_that_waits()
                self.kill(killed)
            connection.close()

        async def main() -> None:
            killing = asyncio.ensure_future(asyncio.to_thread(kill_while_it_waits))
            await asyncio.to_thread(locked.wait)
            with pytest.raises(StorageError, match="refused"):
                await session.add_items([ITEM])
            await killing

        locked = threading.Event()
        asyncio.run(main())
        asyncio.run(session.add_items([ITEM]))
        assert AgentSession.objects.get().item_count == 2

    def kill(self, ids: list[int]) -> None:
        with connection.cursor() as cursor:
            for each in ids:
                if DATABASE_KIND == "postgres":
                    # Waits until it is gone.
                    cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [each])
                else:
                    cursor.execute(f"KILL {each}")
        time.sleep(0.2)


@pytest.mark.django_db(transaction=True)
class TestSyncCallerWaits:
    """A view or a test that holds a transaction lends its own connection."""

    def test_it_runs_in_the_callers_thread(self) -> None:
        async def main() -> int:
            return await threads().run(threading.get_ident)

        assert async_to_sync(main)() == threading.get_ident()
        assert asyncio.run(main()) != threading.get_ident()

    def test_it_sees_and_shares_the_callers_transaction(self) -> None:
        session = get_session("atomic")
        with transaction.atomic():
            session.sync.add_items([ITEM])
            assert len(async_to_sync(session.get_items)()) == 1
            async_to_sync(session.add_items)([ITEM])
            transaction.set_rollback(True)
        assert session.sync.get_items() == []

    def test_an_own_loop_inside_of_a_transaction_borrows_its_connection(self) -> None:
        session = get_session("lent")
        with transaction.atomic():
            session.sync.add_items([ITEM])

            async def main() -> list[Any]:
                await asyncio.gather(*(session.add_items([ITEM]) for _ in range(5)))
                return await session.get_items()

            assert len(asyncio.run(main())) == 6
            # Given back: this thread may go on using it.
            assert len(session.sync.get_items()) == 6
            transaction.set_rollback(True)
        assert session.sync.get_items() == []
        assert not connection.allow_thread_sharing

    @pytest.mark.usefixtures("default_loop")
    def test_run_sync_inside_of_a_transaction(self) -> None:
        session = get_session("run-sync")
        agent = Agent(
            name="Clerk", model=ScriptedModel([[assistant_message("Hello to you.")]])
        )
        with transaction.atomic():
            result = Runner.run_sync(agent, "Hello", session=session)
            assert result.final_output == "Hello to you."
            assert len(session.sync.get_items()) == 2
            transaction.set_rollback(True)
        assert session.sync.get_items() == []

    @pytest.mark.usefixtures("default_loop")
    def test_run_sync_outside_of_one(self) -> None:
        session = get_session("run-sync")
        agent = Agent(
            name="Clerk", model=ScriptedModel([[assistant_message("Hello to you.")]])
        )
        Runner.run_sync(agent, "Hello", session=session)
        assert len(session.sync.get_items()) == 2


TEST_RUN = """
import asyncio, re, sys
from pathlib import Path
import django
django.setup()
from django.test.runner import DiscoverRunner
from agent_sessions import get_session, sessions

docs = Path("docs/sessions.md").read_text()
source = "class Runner(" + docs.split("class Runner(")[1].split("```")[0]
exec(source)
runner = (Runner if sys.argv[1] == "documented" else DiscoverRunner)(verbosity=0)
made = runner.setup_databases()
for _ in range(20):
    asyncio.run(get_session("tested").add_items([{"role": "user", "content": "Hi"}]))
runner.teardown_databases(made)
"""


@pytest.mark.django_db(transaction=True)
class TestInAProjectsTests:
    __test__ = DATABASE_KIND == "postgres"

    def test_the_documented_runner_can_drop_the_test_database(
        self, database_environment: dict[str, str]
    ) -> None:
        done = self.run("plain", database_environment)
        assert "is being accessed by other users" in done.stderr
        done = self.run("documented", database_environment)
        assert done.returncode == 0, done.stderr

    def run(self, kind: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        name = f"{env['AGENT_SESSIONS_TEST_NAME']}_{kind}"
        return subprocess.run(
            [sys.executable, "-c", TEST_RUN, kind],
            env=env | {"AGENT_SESSIONS_TEST_NAME": name},
            capture_output=True,
            text=True,
            timeout=60,
        )


FORKING = """
import asyncio, os, sys
import django
django.setup()
from agent_sessions import get_session
from agent_sessions.handler import sessions
from django.db import connections

item = {"role": "user", "content": "Hello"}
session = get_session("forked")
asyncio.run(session.add_items([item]))
pool = sessions["default"].threads
before = pool._pool
# As servers that fork do: the parent's thread keeps no connection across it.
connections.close_all()
child = os.fork()
if not child:
    asyncio.run(session.add_items([item]))
    assert pool._pool is not before
    assert len(asyncio.run(session.get_items())) == 2
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
# The child must not have closed or used the parent's sockets.
asyncio.run(session.add_items([item]))
assert pool._pool is before
assert len(asyncio.run(session.get_items())) == 3
pool.close()
"""

CLOSED_AFTER_FORK = """
import asyncio, os
import django
django.setup()
from agent_sessions import get_session
from agent_sessions.handler import sessions
from django.db import connections

session = get_session("forked")
asyncio.run(session.get_items())
connections.close_all()
child = os.fork()
if not child:
    # There are no threads to wait for in here, and the sockets are the parent's.
    sessions["default"].close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
asyncio.run(session.get_items())
sessions["default"].close()
"""


@pytest.mark.parametrize("source", [FORKING, CLOSED_AFTER_FORK], ids=["use", "close"])
def test_a_fork_gets_threads_of_its_own(
    source: str, database_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads, which is the point.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source],
        env=database_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
