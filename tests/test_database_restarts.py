"""A database's server is killed in mid-write, and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import mariadb, postgres
from tests.servers.mortal import Mortal, mortal
from tests.settings import DATABASE_KIND

ROOT = Path(__file__).parent.parent
NAME = "restarted"
# The server's death follows this many acknowledged batches.
BEFORE = 60

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(DATABASE_KIND == "sqlite", reason="SQLite has no server"),
]


def create(server: Mortal) -> None:
    """Make an empty database."""
    if DATABASE_KIND == "postgres":
        import psycopg

        with psycopg.connect(
            host=server.host,
            port=server.port,
            user="postgres",
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(f"CREATE DATABASE {NAME}")
    else:
        import MySQLdb

        connection = MySQLdb.connect(host=server.host, port=server.port, user="root")
        connection.query(f"CREATE DATABASE {NAME} CHARACTER SET utf8mb4")
        connection.close()


def test_a_server_is_killed_in_mid_write() -> None:
    """What was acknowledged is there, the rest was an error, and work goes on.

    The same session object, in the same process and loop, writes again as soon as the
    server is back.
    """
    kinds = {"postgres": postgres.recipe, "mariadb": mariadb.recipe}
    with mortal(kinds[DATABASE_KIND](lasting=True)) as server:
        create(server)
        environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "AGENT_SESSIONS_TEST_DATABASE": DATABASE_KIND,
            "AGENT_SESSIONS_TEST_NAME": NAME,
            "AGENT_SESSIONS_TEST_HOST": server.host,
            "AGENT_SESSIONS_TEST_PORT": str(server.port),
        }
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "--verbosity=0"],
            env=environment,
            cwd=ROOT,
            check=True,
            timeout=120,
        )
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.restarted_writer"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            told = watch(writer, server)
        finally:
            writer.kill()
            writer.communicate()
    acknowledged, failed = told["acknowledged"], told["failed"]
    items = told["items"]
    stored = [item["batch"] for item in items[::4]]
    assert items == [{"batch": name, "n": n} for name in stored for n in range(4)]
    assert len(set(stored)) == len(stored)
    # A commit's answer may be what was lost: then the batch is there as a whole.
    assert set(acknowledged) <= set(stored) <= {*acknowledged, *failed}
    assert len(acknowledged) > BEFORE


def watch(writer: subprocess.Popen[str], server: Mortal) -> dict[str, list[Any]]:
    """Kill the server among the writes, bring it back at the first error."""
    stored = 0
    is_down = False
    assert writer.stdout is not None
    for line in writer.stdout:
        if line == "stored\n":
            stored += 1
            if stored == BEFORE:
                server.kill()
                is_down = True
        elif line == "failed\n":
            if is_down:
                server.start()
                is_down = False
        else:
            found: dict[str, list[Any]] = json.loads(line)
            return found
    raise AssertionError("the writer ended before its report")
