"""What a command says where the database, or the configuration, lets it do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.migrations.executor import MigrationExecutor
from django.utils.connection import ConnectionDoesNotExist

from agent_sessions.backends.spelling import (
    DEFAULT_ALIAS,
)
from agent_sessions.exceptions import AgentSessionError, StorageError
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession

_OF_DATABASES = (DatabaseError, InterfaceError, StorageError)


@dataclass(frozen=True, slots=True)
class _Unmigrated:
    """A database that lacks migrations, and whether it has no table of ours at all."""

    using: str
    migrations: int
    is_bare: bool


def explain(exc: Exception, *, nothing_done: int) -> CommandError | None:
    """Return the error to print instead of one; None where it says enough itself.

    `nothing_done` is the exit code of a call that has done nothing.
    """
    chain = list(_chain(exc))
    found = next((each for each in chain if isinstance(each, _OF_DATABASES)), None)
    if found is not None and (lacking := _find_unmigrated()) is not None:
        code = exc.returncode if isinstance(exc, CommandError) else nothing_done
        where = "" if lacking.using == DEFAULT_ALIAS else f" --database {lacking.using}"
        count = lacking.migrations
        return CommandError(
            f"The database {lacking.using!r} is not migrated: {count} "
            f"{'migration is' if count == 1 else 'migrations are'} not applied. Run "
            f"manage.py migrate{where} first.",
            returncode=nothing_done if lacking.is_bare else code,
        )
    if isinstance(exc, CommandError):
        return None
    if isinstance(exc, AgentSessionError):
        return CommandError(str(exc), returncode=nothing_done)
    if isinstance(exc, ImproperlyConfigured | ConnectionDoesNotExist):
        return CommandError(
            f"{exc} Mend the settings, and run the command again.",
            returncode=nothing_done,
        )
    if found is None:
        return None
    # The driver's own words may quote contents, so only its kind is told.
    kind, advice = type(found).__name__, "Its own log says why."
    if isinstance(found, OperationalError | InterfaceError):
        advice = (
            "See that it runs, that DATABASES says where, and that it takes writes."
        )
    return CommandError(
        f"The database could not be used ({kind}). {advice}", returncode=nothing_done
    )


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """Return an error and what it was caused by."""
    seen: set[int] = set()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _find_unmigrated() -> _Unmigrated | None:
    """Find a database of sessions that lacks migrations; None where none can be seen."""
    for using in _databases():
        # Out of order, or in a transaction that is lost: nobody can tell.
        with suppress(Exception):
            executor = MigrationExecutor(connections[using])
            targets = executor.loader.graph.leaf_nodes(AgentSession._meta.app_label)
            if plan := executor.migration_plan(targets):
                tables = connections[using].introspection.table_names()
                is_bare = AgentSession._meta.db_table not in tables
                return _Unmigrated(using, len(plan), is_bare)
    return None


def _databases() -> list[str]:
    """Name the databases in which sessions have their rows."""
    found: list[str] = []
    with suppress(AgentSessionError, ImproperlyConfigured):
        for alias in [*sessions]:
            with suppress(AgentSessionError, ImproperlyConfigured):
                found.append(sessions[alias].directory.using)
    with suppress(AgentSessionError, ImproperlyConfigured):
        found.append(sessions.database().directory.using)
    return list(dict.fromkeys(found))
