"""A database of its own for a benchmark, and Django set up on it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import django
from django.conf import settings
from django.core.management import call_command
from django.db import connections

from benchmarks.delay import delayed
from tests.servers.postgres import postgres
from tests.servers.valkey import valkey

# What the network between takes of a round trip.
DELAY = 0.002

_SQLITE_OPTIONS = {"transaction_mode": "IMMEDIATE", "timeout": 20}


@dataclass(frozen=True)
class Database:
    """Where a benchmark's stores lie; Django's aliases are `aliases`."""

    kind: str
    aliases: tuple[str, ...]
    server: dict[str, Any]
    directory: Path
    # Ports of a Redis server, and of both behind a network with DELAY.
    redis: int = 0
    slow: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Name the database and its version."""
        connection = connections["default"]
        numbers = connection.get_database_version()
        return f"{connection.display_name} {'.'.join(map(str, numbers))}"

    def settle(self) -> None:
        """Bring what was written to rest, so that each measurement starts alike."""
        if self.kind == "sqlite":
            # What others wrote would be on its way to the disk meanwhile.
            os.sync()
            return
        import psycopg

        for name in ("bench", "peers"):
            with psycopg.connect(
                **self.server, dbname=name, autocommit=True
            ) as connection:
                connection.execute("VACUUM (ANALYZE)")
                connection.execute("CHECKPOINT")


@contextmanager
def database(kind: str, *, peers: bool = False) -> Iterator[Database]:
    """Make an empty database with our tables, set Django up and take it down again.

    `peers` adds what other stores than ours need: a Redis server, a slow network.
    """
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="agent-sessions-bench-")
            )
        )
        if kind == "sqlite":
            yield from _sqlite(directory)
            return
        server = stack.enter_context(postgres())
        redis, slow = 0, {}
        if peers:
            redis = stack.enter_context(valkey()).port
            for name, port in (("postgresql", server.port), ("redis", redis)):
                slow[name] = stack.enter_context(delayed(port, DELAY))
        place = {"host": server.host, "port": server.port, "user": "postgres"}
        made = Database("postgresql", ("default",), place, directory, redis, slow)
        yield from _postgresql(made)


def _sqlite(directory: Path) -> Iterator[Database]:
    # One at the SDK's own durability, one at what our checks recommend.
    aliases = {"default": "FULL", "normal": "NORMAL"}
    configure(
        {
            alias: {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(directory / f"{alias}.sqlite3"),
                "OPTIONS": {
                    **_SQLITE_OPTIONS,
                    "init_command": "PRAGMA journal_mode=WAL; "
                    f"PRAGMA synchronous={synchronous};",
                },
            }
            for alias, synchronous in aliases.items()
        }
    )
    yield from _migrated(Database("sqlite", tuple(aliases), {}, directory))


def _postgresql(made: Database) -> Iterator[Database]:
    place = made.server
    ports = {"default": place["port"]}
    if made.slow:
        ports["slow"] = made.slow["postgresql"]
    configure(
        {
            alias: {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "bench",
                "USER": place["user"],
                "HOST": place["host"],
                "PORT": str(port),
            }
            for alias, port in ports.items()
        }
    )
    import psycopg

    with psycopg.connect(**place, dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE bench")
        # The drivers' own tables and the SDK's.
        connection.execute("CREATE DATABASE peers")
    yield from _migrated(made)


def configure(databases: dict[str, Any]) -> None:
    """Set Django up on databases."""
    settings.configure(
        DATABASES=databases,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "agent_sessions",
        ],
        USE_TZ=True,
    )
    django.setup()


def _migrated(made: Database) -> Iterator[Database]:
    from agent_sessions.handler import sessions

    for alias in made.aliases:
        call_command("migrate", database=alias, verbosity=0)
    if find_spec("openai_django_sessions"):
        from openai_django_sessions import DjangoSession

        # It makes its own tables, and only where no loop runs.
        DjangoSession("", create_tables=True)
    try:
        yield made
    finally:
        sessions.reset()
        connections.close_all()
