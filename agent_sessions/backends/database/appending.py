"""Storing one batch, and making the session of a first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.statements import AnyBatch
from agent_sessions.exceptions import StorageError

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine


def append_batch(engine: Engine, key: SessionKey, batch: AnyBatch) -> None:
    """Store a batch. Raises StorageError, and what assert_own() and create() do."""
    _append(engine, key, batch, first=False)


def begin_batch(engine: Engine, key: SessionKey, batch: AnyBatch) -> None:
    """Store a batch for which no row was found: it may be a session's first one.

    Raises what append_batch() does.
    """
    _append(engine, key, batch, first=True)


def _append(engine: Engine, key: SessionKey, batch: AnyBatch, *, first: bool) -> None:
    try:
        _write(engine, key, batch, first=first)
    except (StorageError, UnicodeEncodeError) as exc:
        narrowed = engine.statements.narrowed(engine.connection, batch, exc)
        if narrowed is None:
            raise
        _write(engine, key, narrowed, first=first)


def _write(engine: Engine, key: SessionKey, batch: AnyBatch, *, first: bool) -> None:
    statements = engine.statements
    alone = statements.appends_alone(engine.connection, batch)

    def write(connection: BaseDatabaseWrapper) -> bool:
        return statements.append(connection, key, batch, timezone.now())

    def begin(connection: BaseDatabaseWrapper) -> bool:
        engine.directory.create(key)
        return write(connection)

    if first and engine.run(begin):
        return
    while not (engine.run(write, alone=alone) or engine.run(begin)):
        pass
