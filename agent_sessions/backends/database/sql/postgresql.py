"""The hot path's statements in PostgreSQL's words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.sql.base import (
    COLUMNS,
    AnyBatch,
    Held,
    Statement,
    Statements,
)
from agent_sessions.concurrency.connections import is_pooled, is_shared
from agent_sessions.items import EncodedItem, Item, encode_batch, look_through
from agent_sessions.times import day_of

# PostgreSQL takes more rows than these by COPY: reading them from JSON would spill to
# its disk.
_COPIED = 500
# What is drawn from an item, its turn first.
_DRAWN = EncodedItem._fields[1:]
# So many lines are sent at once.
_LINES = 100


class PostgreSQLStatements(Statements):
    """One statement for an append: counters, positions and rows in one round trip."""

    same_owner = "{s}.user_id IS NOT DISTINCT FROM %s"
    encoded_data = "data"
    # A statement that has waited for the row finds it as it is now, but no branch that
    # was made meanwhile: it counts nothing, and the next one finds both.
    sees_branch = (
        " AND ({s}.branch_id IS NULL OR "
        "(SELECT {b}.id FROM {b} WHERE {b}.id = {s}.branch_id) IS NOT NULL)"
    )
    locking = "SELECT id, branch_id FROM {s} WHERE {owned} FOR UPDATE"
    writes_all_indexes = False

    def can_be_awaited(self, connection: BaseDatabaseWrapper) -> bool:
        """Return whether the settings of a database let a loop await prepared ones."""
        from django.db.backends.postgresql.psycopg_any import is_psycopg3

        options = connection.settings_dict.get("OPTIONS") or {}
        return (
            is_psycopg3
            # Windows' own loop can't listen to a socket.
            and os.name == "posix"
            # The pool is sized for the threads.
            and not is_pooled(connection)
            # How Django and psycopg are told of a pooler that changes connections.
            and not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS")
            and options.get("prepare_threshold", 0) is not None
        )

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: AnyBatch) -> bool:
        # One statement is a transaction of its own.
        return len(batch) <= _COPIED

    def batch(self, items: Sequence[Item]) -> AnyBatch:
        # The server can store the first items of many while the others are encoded.
        return encode_batch(items) if len(items) <= _COPIED else look_through(items)

    def append(
        self,
        connection: BaseDatabaseWrapper,
        key: SessionKey,
        batch: AnyBatch,
        now: datetime,
    ) -> bool:
        if not self.appends_alone(connection, batch):
            return super().append(connection, key, batch, now)
        with self.cursor(connection) as cursor:
            if key.branch is not None:
                # One that is put in its place meanwhile is seen by the next statement.
                self.lock(cursor, key)
            # A transaction of its own ends with the statement, and what is set for it.
            is_ours = connection.autocommit and not connection.in_atomic_block
            is_set = is_ours and is_shared(connection)
            cursor.execute(*self.append_statement(key, batch, now, is_set=is_set))
            return bool(cursor.rowcount)

    def append_statement(
        self, key: SessionKey, batch: AnyBatch, now: datetime, *, is_set: bool = False
    ) -> Statement:
        """Return the statement that appends a batch as a whole, and its parameters.

        With `is_set` the checks of foreign keys at its end go by indexes.
        """
        update, params = self.count(key, batch, now)
        size, turns = len(batch), batch.turns
        name: list[Any] = []
        # Subqueries, not joins: with old statistics those read all branches.
        target = "id = (SELECT branch_id FROM s)"
        if key.branch is not None:
            target = "session_id = (SELECT id FROM s) AND name = %s AND version = 0"
            name = [key.branch]
        setting = ", set_config('enable_seqscan', 'off', true)" if is_set else ""
        # Of type json, not jsonb, each element keeps its text byte for byte. The
        # other columns travel apart: reading a member of an object would unescape
        # all of it, and fail on NUL.
        return (
            f"WITH s AS ({update} RETURNING {self.session}.id, "
            f"{self.session}.branch_id{setting}), "
            f"b AS (UPDATE {self.branch} SET head = head + %s, turn = turn + %s "
            f"WHERE {target} RETURNING id, "
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
                "[" + ",".join(row.data for row in batch) + "]",
                json.dumps([dict(zip(_DRAWN, row[1:], strict=True)) for row in batch]),
            ],
        )

    def insert_rows(
        self, cursor: CursorWrapper, rows: Iterable[tuple[Any, ...]]
    ) -> None:
        if not hasattr(cursor.cursor, "copy"):
            # psycopg2, which copies from files only.
            super().insert_rows(cursor, rows)
            return
        cursor.execute("SELECT row_security_active(%s::regclass)", [self.item])
        if cursor.fetchone()[0]:
            # COPY is refused then.
            super().insert_rows(cursor, rows)
            return
        with (
            cursor.db.wrap_database_errors,
            cursor.copy(f"COPY {self.item} ({COLUMNS}) FROM STDIN") as copy,
        ):
            lines = map(_line, rows)
            while chunk := "".join(islice(lines, _LINES)):
                copy.write(chunk)

    def take_newest(self, connection: BaseDatabaseWrapper, held: Held) -> str | None:
        """Delete the newest row of a held session's current branch; give its text.

        None where that isn't all: the branch has no rows of its own, or a fork shares
        the newest.
        """
        now = timezone.now()
        statement = (
            f"WITH n AS (SELECT id, position FROM {self.item} WHERE branch_id = %s "
            "ORDER BY position DESC LIMIT 1), "
            f"d AS (DELETE FROM {self.item} i USING n WHERE i.id = n.id "
            f"AND NOT EXISTS (SELECT 1 FROM {self.branch} "
            "WHERE parent_id = %s AND fork_position >= n.position) "
            "RETURNING i.data, i.turn, i.type = 'message' AND i.role = 'user' AS opens), "
            f"s AS (UPDATE {self.session} SET item_count = item_count - 1, "
            f"updated_at = %s, active_on = %s FROM d WHERE {self.session}.id = %s), "
            f"b AS (UPDATE {self.branch} SET turn = greatest(d.turn - 1, 0) "
            f"FROM d WHERE {self.branch}.id = %s AND d.opens) "
            "SELECT data FROM d"
        )
        moment = [self.adapt_time(now), self.adapt_date(day_of(now))]
        branch = held.branch_id
        with connection.cursor() as cursor:
            cursor.execute(statement, [branch, branch, *moment, held.pk, branch])
            row = cursor.fetchone()
        return None if row is None else str(row[0])


def _line(row: tuple[Any, ...]) -> str:
    """Write a row as COPY reads it; the driver takes ten times as long."""
    branch, position, turn, data, kind, role, call, tool, text, size, created_at = row
    drawn = f"{kind}\t{role}\t{call}\t{tool}\t{text}"
    if drawn.count("\t") > 4 or "\\" in drawn or "\n" in drawn or "\r" in drawn:
        drawn = "\t".join(map(_escaped, row[4:9]))
    return (
        f"{branch}\t{position}\t{turn}\t{_escaped(data)}\t{drawn}\t{size}\t"
        f"{created_at}\n"
    )


def _escaped(text: str) -> str:
    text = text.replace("\\", r"\\")
    # JSON has none of these, but unreadable items that an import keeps may.
    if "\n" in text or "\t" in text or "\r" in text:
        text = text.replace("\n", r"\n").replace("\t", r"\t").replace("\r", r"\r")
    return text
