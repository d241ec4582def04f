"""A migrated database on a server that a test kills."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import mariadb, postgres
from tests.servers.mortal import Mortal, mortal
from tests.servers.process import Server

ROOT = Path(__file__).parent.parent.parent
NAME = "lasting"
_RECIPES = {"postgres": postgres.recipe, "mariadb": mariadb.recipe}


@contextmanager
def mortal_database(kind: str) -> Iterator[tuple[Mortal, dict[str, str]]]:
    """Run a server that keeps what it committed; give the environment that uses it."""
    with mortal(_RECIPES[kind](lasting=True)) as server:
        create_database(kind, server, NAME)
        environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "AGENT_SESSIONS_TEST_DATABASE": kind,
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
        yield server, environment


def create_database(kind: str, server: Mortal | Server, name: str) -> None:
    """Make an empty database."""
    if kind == "postgres":
        import psycopg

        with psycopg.connect(
            host=server.host,
            port=server.port,
            user="postgres",
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}")
    else:
        import MySQLdb

        connection = MySQLdb.connect(host=server.host, port=server.port, user="root")
        connection.query(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        connection.close()
