"""A database of its own for a benchmark, and Django set up on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django
from django.conf import settings
from django.core.management import call_command
from django.db import connections

from tests.servers.postgres import postgres

_SQLITE_OPTIONS = {"transaction_mode": "IMMEDIATE", "timeout": 20}


@dataclass(frozen=True)
class Database:
    """Where a benchmark's stores lie; Django's aliases are `aliases`."""

    kind: str
    aliases: tuple[str, ...]
    server: dict[str, Any]
    directory: Path

    @property
    def version(self) -> str:
        """Name the database and its version."""
        connection = connections["default"]
        numbers = connection.get_database_version()
        return f"{connection.display_name} {'.'.join(map(str, numbers))}"

    def settle(self) -> None:
        """Bring what was written to rest, so that each measurement starts alike."""
        if self.kind != "postgresql":
            return
        import psycopg

        for name in ("bench", "peers"):
            with psycopg.connect(
                **self.server, dbname=name, autocommit=True
            ) as connection:
                connection.execute("VACUUM (ANALYZE)")
                connection.execute("CHECKPOINT")


@contextmanager
def database(kind: str) -> Iterator[Database]:
    """Make an empty database with our tables, set Django up and take it down again."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="agent-sessions-bench-") as name:
            yield from _sqlite(Path(name))
    else:
        with (
            postgres() as server,
            tempfile.TemporaryDirectory(prefix="agent-sessions-bench-") as name,
        ):
            place = {"host": server.host, "port": server.port, "user": "postgres"}
            yield from _postgresql(place, Path(name))


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


def _postgresql(place: dict[str, Any], directory: Path) -> Iterator[Database]:
    configure(
        {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "bench",
                "USER": place["user"],
                "HOST": place["host"],
                "PORT": str(place["port"]),
            }
        }
    )
    import psycopg

    with psycopg.connect(**place, dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE bench")
        # The drivers' own tables and the SDK's.
        connection.execute("CREATE DATABASE peers")
    yield from _migrated(Database("postgresql", ("default",), place, directory))


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
    try:
        yield made
    finally:
        sessions.reset()
        connections.close_all()
