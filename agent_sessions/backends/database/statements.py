"""The few SQL statements of the hot path, in each database's own words.

No model instances and no joins on the way to an ordered window: PostgreSQL would
read and sort the whole history for a filter through the parent's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.lineage import Segment
from agent_sessions.items import Batch
from agent_sessions.models import AgentSession, Branch, SessionItem

COLUMNS = (
    "branch_id, position, turn, data, type, role, call_id, tool_name, text, size, "
    "created_at"
)
# A row's position and text.
Row = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch goes: the last position and turn that were taken before it."""

    branch_id: int
    head: int
    turn: int


class Statements:
    """Statements in the SQL that SQLite speaks; other databases override some."""

    same_owner = "{s}.user_id IS %s"
    # Whether one transaction for several batches is worth the while.
    appends_together = True
    # Whether an UPDATE writes to the indexes of all columns it names, changed or not.
    writes_all_indexes = True

    def __init__(self, connection: BaseDatabaseWrapper, alias: str) -> None:
        self.alias = alias
        self.adapt_time = connection.ops.adapt_datetimefield_value
        self.adapt_date = connection.ops.adapt_datefield_value
        self._user_field = AgentSession._meta.get_field("user")
        quote = connection.ops.quote_name
        self.session = quote(AgentSession._meta.db_table)
        self.branch = quote(Branch._meta.db_table)
        self.item = quote(SessionItem._meta.db_table)
        self.owned = (
            f"{self.session}.backend = %s AND {self.session}.session_id = %s AND "
            + self.same_owner.format(s=self.session)
        )
        self.current_branch = (
            f"SELECT {self.session}.branch_id FROM {self.session} WHERE {self.owned}"
        )
        self.named_branch = (
            f"SELECT {self.branch}.id FROM {self.branch} JOIN {self.session} "
            f"ON {self.session}.id = {self.branch}.session_id "
            f"WHERE {self.owned} AND {self.branch}.name = %s "
            f"AND {self.branch}.archived_at IS NULL"
        )

    def owner(self, key: SessionKey, connection: BaseDatabaseWrapper) -> list[Any]:
        """Give the parameters of `owned`."""
        user_id = self._user_field.get_db_prep_value(key.user_id, connection)
        return [self.alias, key.session_id, user_id]

    def branch_of(
        self, key: SessionKey, connection: BaseDatabaseWrapper
    ) -> tuple[str, list[Any]]:
        """Give a scalar subquery for the branch that a key means."""
        owner = self.owner(key, connection)
        if key.branch is None:
            return self.current_branch, owner
        return self.named_branch, [*owner, key.branch]

    def execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        """Execute one of the statements that each turn needs."""
        cursor.execute(sql, params)

    def latest(
        self, cursor: CursorWrapper, key: SessionKey, limit: int | None
    ) -> list[Row]:
        """Read the newest rows of the branch itself, newest first."""
        branch, params = self.branch_of(key, cursor.db)
        # A number, not a parameter: PostgreSQL takes one that it doesn't know for a
        # tenth of the history, and would plan this anew at every call.
        window = "" if limit is None else f" LIMIT {limit:d}"
        self.execute(
            cursor,
            f"SELECT position, data FROM {self.item} WHERE branch_id = ({branch}) "
            f"ORDER BY position DESC{window}",
            params,
        )
        rows: list[Row] = cursor.fetchall()
        return rows

    def find_branch(self, cursor: CursorWrapper, key: SessionKey) -> int | None:
        """Find the branch that a key means."""
        branch, params = self.branch_of(key, cursor.db)
        cursor.execute(branch, params)
        return first(cursor.fetchone())

    def inherited(
        self, cursor: CursorWrapper, segments: Sequence[Segment], limit: int | None
    ) -> list[Row]:
        """Read the newest rows of ancestors, newest first.

        Each part is a window of its own on the index; a join with the lineage would
        read and sort all of them. Whole histories aren't sorted by the database either,
        which would copy them.
        """
        window = "" if limit is None else f" LIMIT {limit:d}"
        part = (
            f"SELECT * FROM (SELECT position, data FROM {self.item} WHERE branch_id = %s "
            f"AND position > %s AND position <= %s ORDER BY position DESC{window}) AS p"
        )
        params: list[Any] = []
        for segment in segments:
            params += [segment.branch_id, segment.after, segment.upto]
        parts = " UNION ALL ".join([part] * len(segments))
        if limit is not None:
            parts = f"SELECT * FROM ({parts}) AS line ORDER BY position DESC{window}"
        cursor.execute(parts, params)
        rows: list[Row] = list(cursor.fetchall())
        if limit is None:
            rows.sort(key=itemgetter(0), reverse=True)
        return rows

    def append(
        self, cursor: CursorWrapper, key: SessionKey, batch: Batch, now: datetime
    ) -> bool:
        """Store a batch; False, with nothing written, where no row lets it in.

        Needs a transaction around it unless `appends_alone`.
        """
        if not self.appends_alone(cursor.db, batch):
            return self._append(cursor, key, batch, now)
        cursor.execute("BEGIN IMMEDIATE")
        try:
            stored = self._append(cursor, key, batch, now)
            cursor.execute("COMMIT")
        except BaseException:
            _roll_back(cursor)
            raise
        return stored

    def append_all(
        self, cursor: CursorWrapper, calls: Sequence[tuple[SessionKey, Batch]]
    ) -> list[bool]:
        """Store several batches in one transaction; tell which of them it holds.

        None of them where one fails.
        """
        cursor.execute("BEGIN IMMEDIATE")
        try:
            now = timezone.now()
            stored = [self._append(cursor, key, batch, now) for key, batch in calls]
        except DatabaseError:
            _roll_back(cursor)
            return [False] * len(calls)
        except BaseException:
            _roll_back(cursor)
            raise
        try:
            cursor.execute("COMMIT")
        except BaseException:
            _roll_back(cursor)
            raise
        return stored

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: Batch) -> bool:
        """Tell whether append() makes a transaction, at a fifth of atomic()'s cost."""
        return not connection.in_atomic_block and connection.get_autocommit()

    def _append(
        self, cursor: CursorWrapper, key: SessionKey, batch: Batch, now: datetime
    ) -> bool:
        place = self.advance(cursor, key, batch, now)
        if place is None:
            return False
        self.insert(cursor, place, batch, now)
        return True

    def advance(
        self, cursor: CursorWrapper, key: SessionKey, batch: Batch, now: datetime
    ) -> Place | None:
        """Take the positions of a batch, holding the session's row from here on."""
        update, params = self.count(key, batch, now, cursor.db)
        # The first statement writes: a transaction that reads first loses its turn
        # to other writers and fails with "database is locked".
        cursor.execute(f"{update} RETURNING branch_id, id, active_on", params)
        row = cursor.fetchone()
        if row is None or row[0] is None:
            return None
        if str(row[2]) != str(now.date()):
            cursor.execute(
                f"UPDATE {self.session} SET active_on = %s WHERE id = %s",
                [self.adapt_date(now.date()), row[1]],
            )
        where, value = ("id", row[0])
        if key.branch is not None:
            where, value = ("session_id = %s AND name", key.branch)
        cursor.execute(
            f"UPDATE {self.branch} SET head = head + %s, turn = turn + %s "
            f"WHERE {where} = %s RETURNING id, head, turn",
            [len(batch), batch.turns, *([row[1]] if key.branch else []), value],
        )
        found = cursor.fetchone()
        if found is None:
            return None
        branch_id, head, turn = found
        return Place(branch_id, head - len(batch), turn - batch.turns)

    def count(
        self,
        key: SessionKey,
        batch: Batch,
        now: datetime,
        connection: BaseDatabaseWrapper,
    ) -> tuple[str, list[Any]]:
        """Give the update of the session's counters.

        It is guarded by owner and fence, and by the branch: a batch that finds no
        place must not be counted.
        """
        fence = "" if key.fence is None else f" AND {self.session}.fence = %s"
        branch = f" AND {self.session}.branch_id IS NOT NULL"
        if key.branch is not None:
            branch = (
                f" AND EXISTS (SELECT 1 FROM {self.branch} WHERE "
                f"{self.branch}.session_id = {self.session}.id "
                f"AND {self.branch}.name = %s AND {self.branch}.archived_at IS NULL)"
            )
        # Two indexes hold the day, which changes with a day's first write.
        day = "" if self.writes_all_indexes else "active_on = %s, "
        return (
            f"UPDATE {self.session} SET item_count = item_count + %s, "
            f"updated_at = %s, {day}"
            "title = CASE WHEN title = '' THEN %s ELSE title END "
            f"WHERE {self.owned}{fence}{branch}",
            [
                len(batch),
                self.adapt_time(now),
                *([self.adapt_date(now.date())] if day else []),
                batch.title,
                *self.owner(key, connection),
                *([] if key.fence is None else [key.fence]),
                *([] if key.branch is None else [key.branch]),
            ],
        )

    def insert(
        self, cursor: CursorWrapper, place: Place, batch: Batch, now: datetime
    ) -> None:
        """Insert a batch's rows at the positions that were taken for it."""
        cursor.executemany(
            f"INSERT INTO {self.item} ({COLUMNS}) VALUES ({', '.join(['%s'] * 11)})",
            self.values(place, batch, self.adapt_time(now)),
        )

    def values(self, place: Place, batch: Batch, created_at: Any) -> list[Any]:
        """Give the columns of a batch's rows."""
        return [
            (
                place.branch_id,
                place.head + index,
                place.turn + row.turn,
                row.data,
                row.type,
                row.role,
                row.call_id,
                row.tool_name,
                row.text,
                len(row.data),
                created_at,
            )
            for index, row in enumerate(batch.rows, 1)
        ]

    def lock(self, cursor: CursorWrapper, key: SessionKey) -> int | None:
        """Hold the session's row to the transaction's end; give its primary key."""
        cursor.execute(
            f"UPDATE {self.session} SET item_count = item_count WHERE {self.owned} "
            "RETURNING id",
            self.owner(key, cursor.db),
        )
        return first(cursor.fetchone())


class MySQLStatements(Statements):
    """MariaDB and MySQL have no UPDATE … RETURNING: update first, then look."""

    same_owner = "{s}.user_id <=> %s"
    appends_together = False
    writes_all_indexes = False

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: Batch) -> bool:
        return False

    def advance(
        self, cursor: CursorWrapper, key: SessionKey, batch: Batch, now: datetime
    ) -> Place | None:
        update, params = self.count(key, batch, now, cursor.db)
        cursor.execute(update, params)
        if not cursor.rowcount:
            return None
        branch, branch_params = self.branch_of(key, cursor.db)
        cursor.execute(branch, branch_params)
        row = cursor.fetchone()
        if row is None or row[0] is None:
            return None
        cursor.execute(
            f"UPDATE {self.branch} SET head = head + %s, turn = turn + %s "
            "WHERE id = %s",
            [len(batch), batch.turns, row[0]],
        )
        cursor.execute(
            f"SELECT id, head, turn FROM {self.branch} WHERE id = %s", [row[0]]
        )
        branch_id, head, turn = cursor.fetchone()
        return Place(branch_id, head - len(batch), turn - batch.turns)

    def lock(self, cursor: CursorWrapper, key: SessionKey) -> int | None:
        cursor.execute(
            f"SELECT id FROM {self.session} WHERE {self.owned} FOR UPDATE",
            self.owner(key, cursor.db),
        )
        return first(cursor.fetchone())


def _roll_back(cursor: CursorWrapper) -> None:
    try:
        cursor.execute("ROLLBACK")
    except DatabaseError:
        # SQLite has done so by itself, or never will.
        cursor.db.close()


def first(row: Any) -> int | None:
    """Give a row's first column; None for no row."""
    return None if row is None else int(row[0])
