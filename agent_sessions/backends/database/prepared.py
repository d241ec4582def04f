"""Statements that PostgreSQL plans once for a connection, not at every call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

# "invalid_sql_statement_name", "duplicate_prepared_statement" and "cached plan must not
# change result type": a pooler has changed the connection, or a migration the table.
_REFUSALS = frozenset({"26000", "42P05", "0A000"})

# What the driver's connections have prepared: several backends may share one.
_known: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


class PreparedStatements:
    """Execute statements by a name under which the connection has them planned.

    Planning takes about as long as executing them. A name tells the text, so a
    connection that somebody else has prepared can't run something else; where a pooler
    hands out connections that haven't, the statements go plain from then on.
    """

    def __init__(self) -> None:
        self.enabled = True

    def execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        """Execute a statement, prepared if that can't do any harm."""
        if not self._may_prepare(cursor.db):
            cursor.execute(sql, params)
            return
        named = _named(sql)
        known = _known.setdefault(cursor.db.connection, set())
        try:
            if named.name not in known:
                cursor.execute(named.prepare)
                known.add(named.name)
            cursor.execute(named.execute, params)
        except DatabaseError as exc:
            # Nothing has been done: each was a transaction of its own.
            if getattr(exc.__cause__, "sqlstate", None) not in _REFUSALS:
                raise
            self.enabled = False
            cursor.execute(sql, params)

    def _may_prepare(self, connection: BaseDatabaseWrapper) -> bool:
        return (
            self.enabled
            # A refusal would end the caller's transaction.
            and not connection.in_atomic_block
            and connection.get_autocommit()
            # EXECUTE takes no parameters that are bound by the server.
            and not getattr(connection.features, "uses_server_side_binding", False)
            # How Django is told of a pooler between it and the server.
            and not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS")
        )


@dataclass(frozen=True, slots=True)
class _Named:
    name: str
    prepare: str
    execute: str


@lru_cache(maxsize=256)
def _named(sql: str) -> _Named:
    digest = hashlib.sha256(sql.encode()).hexdigest()
    name = f"agent_sessions_{digest[:16]}"
    first, *rest = sql.split("%s")
    text = first + "".join(f"${n}{part}" for n, part in enumerate(rest, 1))
    places = ", ".join(["%s"] * len(rest))
    return _Named(name, f"PREPARE {name} AS {text}", f"EXECUTE {name} ({places})")
