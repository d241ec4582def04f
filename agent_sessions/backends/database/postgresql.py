"""The hot path's statements in PostgreSQL's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.prepared import PreparedStatements
from agent_sessions.backends.database.statements import (
    COLUMNS,
    Place,
    Statements,
    first,
)
from agent_sessions.items import Batch

# PostgreSQL takes more rows than these by COPY: reading them from JSON would spill to
# its disk.
_COPIED = 500


class PostgreSQLStatements(Statements):
    """One statement for an append: counters, positions and rows in one round trip."""

    same_owner = "{s}.user_id IS NOT DISTINCT FROM %s"
    appends_together = False
    writes_all_indexes = False

    def __init__(self, connection: BaseDatabaseWrapper, alias: str) -> None:
        super().__init__(connection, alias)
        self.prepared = PreparedStatements()

    def execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        self.prepared.execute(cursor, sql, params)

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: Batch) -> bool:
        # One statement is a transaction of its own.
        return len(batch) <= _COPIED

    def append(
        self, cursor: CursorWrapper, key: SessionKey, batch: Batch, now: datetime
    ) -> bool:
        if not self.appends_alone(cursor.db, batch):
            return self._append(cursor, key, batch, now)
        update, params = self.count(key, batch, now, cursor.db)
        size, turns = len(batch), batch.turns
        name: list[Any] = []
        target = f"{self.branch}.id = s.branch_id"
        if key.branch is not None:
            target = f"{self.branch}.session_id = s.id AND {self.branch}.name = %s"
            name = [key.branch]
        # Of type json, not jsonb, each element keeps its text byte for byte. The
        # other columns travel apart: reading a member of an object would unescape
        # all of it, and fail on NUL.
        self.execute(
            cursor,
            f"WITH s AS ({update} RETURNING {self.session}.id, "
            f"{self.session}.branch_id), "
            f"b AS (UPDATE {self.branch} SET head = head + %s, turn = turn + %s "
            f"FROM s WHERE {target} RETURNING {self.branch}.id, "
            f"head - %s AS head, turn - %s AS turn) "
            f"INSERT INTO {self.item} ({COLUMNS}) "
            "SELECT b.id, b.head + r.ordinal, b.turn + r.turn, r.data::text, r.type, "
            "r.role, r.call_id, r.tool_name, r.text, octet_length(r.data::text), "
            "%s::timestamptz "
            "FROM b, ROWS FROM (json_array_elements(%s::json), "
            "json_to_recordset(%s::json) AS (turn int, type text, role text, "
            "call_id text, tool_name text, text text)) "
            "WITH ORDINALITY AS r "
            "(data, turn, type, role, call_id, tool_name, text, ordinal)",
            [
                *params,
                *(size, turns, *name, size, turns),
                self.adapt_time(now),
                "[" + ",".join(row.data for row in batch.rows) + "]",
                json.dumps(
                    [
                        {
                            "turn": row.turn,
                            "type": row.type,
                            "role": row.role,
                            "call_id": row.call_id,
                            "tool_name": row.tool_name,
                            "text": row.text,
                        }
                        for row in batch.rows
                    ]
                ),
            ],
        )
        return bool(cursor.rowcount > 0)

    def insert(
        self, cursor: CursorWrapper, place: Place, batch: Batch, now: datetime
    ) -> None:
        if not hasattr(cursor.cursor, "copy"):
            # psycopg2, which copies from files only.
            super().insert(cursor, place, batch, now)
            return
        with (
            cursor.db.wrap_database_errors,
            cursor.copy(f"COPY {self.item} ({COLUMNS}) FROM STDIN") as copy,
        ):
            for values in self.values(place, batch, self.adapt_time(now)):
                copy.write_row(values)

    def lock(self, cursor: CursorWrapper, key: SessionKey) -> int | None:
        # A statement of its own: with the delete in the same one, concurrent pops
        # would look for their row before they hold the lock, and find none.
        cursor.execute(
            f"SELECT id FROM {self.session} WHERE {self.owned} FOR UPDATE",
            self.owner(key, cursor.db),
        )
        return first(cursor.fetchone())
