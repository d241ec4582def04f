"""An empty database of one's own that child processes find by their environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import django
from django.core.management import call_command
from django.db import connections

from tests.servers.mariadb import mariadb
from tests.servers.postgres import postgres
from tests.servers.process import Server

KINDS = ("sqlite", "postgres", "mariadb")
_NAME = "stress"


@contextmanager
def place(kind: str) -> Iterator[dict[str, str]]:
    """Start a server, set Django up on it and give the environment for others."""
    with ExitStack() as stack:
        name, server = _NAME, None
        if kind == "sqlite":
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="agent-sessions-stress-")
            )
            name = str(Path(directory) / "stress.sqlite3")
        elif kind == "postgres":
            server = stack.enter_context(postgres())
            _create_on_postgres(server)
        else:
            server = stack.enter_context(mariadb())
            _create_on_mariadb(server)
        environment = {
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "AGENT_SESSIONS_TEST_DATABASE": kind,
            "AGENT_SESSIONS_TEST_NAME": name,
            "AGENT_SESSIONS_TEST_HOST": server.host if server else "",
            "AGENT_SESSIONS_TEST_PORT": str(server.port) if server else "",
        }
        os.environ.update(environment)
        django.setup()
        call_command("migrate", verbosity=0)
        try:
            yield environment
        finally:
            connections.close_all()


def version() -> str:
    """Name the database and its version."""
    connection = connections["default"]
    numbers = connection.get_database_version()
    return f"{connection.display_name} {'.'.join(map(str, numbers))}"


def _create_on_postgres(server: Server) -> None:
    import psycopg

    with psycopg.connect(
        host=server.host,
        port=server.port,
        user="postgres",
        dbname="postgres",
        autocommit=True,
    ) as connection:
        connection.execute(f"CREATE DATABASE {_NAME}")


def _create_on_mariadb(server: Server) -> None:
    import MySQLdb

    connection = MySQLdb.connect(host=server.host, port=server.port, user="root")
    connection.query(f"CREATE DATABASE {_NAME} CHARACTER SET utf8mb4")
    connection.close()
