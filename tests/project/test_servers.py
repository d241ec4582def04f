from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.servers import Server
from tests.servers.valkey import valkey

ROOT = Path(__file__).parents[2]


def _gone(server_pid: int, directory: Path) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.kill(server_pid, 0)
        except ProcessLookupError:
            if not directory.exists():
                return True
        time.sleep(0.05)
    return False


def test_postgres_server_speaks_utf8_and_sorts_by_code_point(
    postgres_server: Server,
) -> None:
    import psycopg

    with psycopg.connect(
        host=postgres_server.host,
        port=postgres_server.port,
        user="postgres",
        dbname="postgres",
    ) as connection:
        encoding = connection.execute("SHOW server_encoding").fetchone()
        order = connection.execute("SELECT 'B' < 'a', lower('Ä')").fetchone()
    assert encoding == ("UTF8",)
    assert order == (True, "ä")


def test_mariadb_server_answers(mariadb_server: Server) -> None:
    import MySQLdb

    connection = MySQLdb.connect(
        host=mariadb_server.host, port=mariadb_server.port, user="root"
    )
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT @@innodb_flush_log_at_trx_commit, VERSION()")
        row = cursor.fetchone()
    finally:
        connection.close()
    assert row[0] == 0
    assert "MariaDB" in row[1]


def test_valkey_server_answers_and_ends_with_its_block() -> None:
    import redis

    with valkey() as server:
        with redis.Redis(host=server.host, port=server.port) as client:
            assert client.set("key", "value")
            pid = client.info("server")["process_id"]
        assert server.directory.exists()
    assert _gone(pid, server.directory)


def test_server_ends_when_its_owner_is_killed() -> None:
    """SIGKILL gives the owner no chance to clean up; the keeper does."""
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from tests.servers.valkey import valkey\n"
            "import redis, time\n"
            "with valkey() as server:\n"
            "    client = redis.Redis(port=server.port)\n"
            "    pid = client.info('server')['process_id']\n"
            "    print(pid, server.directory, flush=True)\n"
            "    time.sleep(60)\n",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout
    with owner.stdout:
        pid, directory = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert _gone(int(pid), Path(directory))


async def test_coroutine_test_runs_with_fixtures(
    request: pytest.FixtureRequest,
) -> None:
    assert asyncio.get_running_loop().is_running()
    assert request.node.name == "test_coroutine_test_runs_with_fixtures"


@settings(max_examples=3)
@given(number=st.integers())
async def test_generated_coroutine_test_runs(number: int) -> None:
    assert isinstance(number, int)


@pytest.mark.django_db
class TestRows:
    """Each leaves a row; the other must not see it."""

    async def test_first(self) -> None:
        await self._use_orm()

    async def test_second(self) -> None:
        await self._use_orm()

    async def _use_orm(self) -> None:
        from django.contrib.auth.models import User

        assert not await User.objects.aexists()
        await User.objects.acreate_user("alice")
        assert await User.objects.acount() == 1


def test_child_process_sees_the_test_database(
    database_environment: dict[str, str],
) -> None:
    from django.contrib.auth.models import User

    User.objects.create_user("alice")
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import django; django.setup()\n"
            "from django.contrib.auth.models import User\n"
            "print(*User.objects.values_list('username', flat=True))",
        ],
        cwd=ROOT,
        env=database_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == "alice\n"
