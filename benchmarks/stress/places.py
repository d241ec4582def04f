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

from tests.servers.lasting import create_database
from tests.servers.mariadb import mariadb
from tests.servers.postgres import postgres

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
            create_database("postgres", server, name)
        else:
            server = stack.enter_context(mariadb())
            create_database("mariadb", server, name)
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
