"""The few SQL statements of the hot path, as SQLite speaks and others nearly do.

No model instances and no joins on the way to an ordered window: PostgreSQL would
read and sort the whole history for a filter through the parent's key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.utils import timezone

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.lineage import Segment
from agent_sessions.backends.database.sql.sqlite import ERRORS, DirectCursor, is_watched
from agent_sessions.items import Batch, Item, LongBatch, encode_batch
from agent_sessions.items.text import UNSEEN
from agent_sessions.models import AgentSession, Branch, SessionItem

COLUMNS = (
    "branch_id, position, turn, data, type, role, call_id, tool_name, text, size, "
    "created_at"
)
AnyBatch = Batch | LongBatch
# SQL and its parameters.
Statement = tuple[str, list[Any]]


class Place(NamedTuple):
    """Where a batch goes: the last position and turn that were taken before it."""

    branch_id: int
    head: int
    turn: int


class Held(NamedTuple):
    """A session's row that is held: its primary key and its current branch's."""

    pk: int
    branch_id: int | None


class Statements:
    """Statements in the SQL that SQLite speaks; other databases override some."""

    same_owner = "{s}.user_id IS %s"
    # A further condition for an append.
    sees_branch = ""
    # Holds the session's row to the transaction's end, in a statement of its own: with
    # a delete in the same one, concurrent pops would look for their row before they
    # hold the lock, and find none.
    locking = (
        "UPDATE {s} SET item_count = item_count WHERE {owned} RETURNING id, branch_id"
    )
    # As bytes, which its reader takes: the driver would decode them for nothing.
    encoded_data = "CAST(data AS BLOB)"
    # Whether an UPDATE writes to the indexes of all columns it names, changed or not.
    writes_all_indexes = True

    def __init__(self, connection: BaseDatabaseWrapper, alias: str) -> None:
        self.alias = alias
        # Nobody opens it: a thread's own connection would outlive its thread.
        self._unopened = connections.create_connection(connection.alias)
        ops = self._unopened.ops
        self._adapt_time = ops.adapt_datetimefield_value
        self._updates: dict[tuple[bool, bool], str] = {}
        # A moment and how it is stored: each append needs one twice.
        self._moment: tuple[datetime | None, Any] = (None, None)
        self.adapt_date = ops.adapt_datefield_value
        self._user_field = AgentSession._meta.get_field("user")
        quote = ops.quote_name
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
            f"SELECT {self.branch}.id FROM {self.branch} WHERE {self.branch}.session_id "
            f"= (SELECT {self.session}.id FROM {self.session} WHERE {self.owned}) "
            f"AND {self.branch}.name = %s AND {self.branch}.version = 0 "
            f"AND {self.branch}.archived_at IS NULL"
        )

    def adapt_time(self, now: datetime) -> Any:
        """Write a moment as the database takes it."""
        moment = self._moment
        if moment[0] is not now:
            moment = self._moment = (now, self._adapt_time(now))
        return moment[1]

    def owner(self, key: SessionKey) -> list[Any]:
        user_id = key.user_id
        if user_id is not None:
            user_id = self._user_field.get_db_prep_value(user_id, self._unopened)
        return [self.alias, key.session_id, user_id]

    def branch_of(self, key: SessionKey) -> Statement:
        """Return a scalar subquery for the branch that a key means."""
        owner = self.owner(key)
        if key.branch is None:
            return self.current_branch, owner
        return self.named_branch, [*owner, key.branch]

    def cursor(self, connection: BaseDatabaseWrapper) -> CursorWrapper:
        if connection.vendor != "sqlite":
            return connection.cursor()
        # What Django does before it makes one.
        connection.close_if_health_check_failed()
        connection.ensure_connection()
        connection.validate_thread_sharing()
        if is_watched(connection):
            return connection.cursor()
        return DirectCursor(connection)

    def rows(
        self, connection: BaseDatabaseWrapper, statement: Statement
    ) -> list[Sequence[Any]]:
        with self.cursor(connection) as cursor:
            cursor.execute(*statement)
            return list(cursor.fetchall())

    def latest(self, key: SessionKey, limit: int | None) -> Statement:
        """Read the newest rows of a branch itself: text, branch, the branch's parent."""
        branch, params = self.branch_of(key)
        # A number, not a parameter: PostgreSQL takes one that it doesn't know for a
        # tenth of the history, and would plan this anew at every call.
        window = "" if limit is None else f" LIMIT {limit:d}"
        # The parent comes along, so that nobody needs to remember who has one.
        return (
            f"SELECT {self.encoded_data}, branch_id, (SELECT {self.branch}.parent_id "
            f"FROM {self.branch} WHERE {self.branch}.id = ({branch})) "
            f"FROM {self.item} WHERE branch_id = ({branch}) "
            f"ORDER BY position DESC{window}",
            [*params, *params],
        )

    def lineage(self, key: SessionKey) -> Statement:
        """Read all branches of a session: the key's own, id, parent, fork.

        No rows say that there is no such session, and no own branch that it is somebody
        else's or lacks the branch. It goes by the owner, not by an id read before.
        """
        branch, params = self.branch_of(key)
        return (
            f"SELECT ({branch}), id, parent_id, fork_position FROM {self.branch} "
            f"WHERE session_id = (SELECT {self.session}.id FROM {self.session} "
            f"WHERE {self.session}.backend = %s AND {self.session}.session_id = %s)",
            [*params, self.alias, key.session_id],
        )

    def inherited(self, segments: Sequence[Segment], limit: int | None) -> Statement:
        """Read the newest rows of ancestors, newest first where there is a limit.

        Each part is a window of its own on the index; a join with the lineage would
        read and sort all of them.
        """
        window = "" if limit is None else f" LIMIT {limit:d}"
        part = (
            f"SELECT * FROM (SELECT {self.encoded_data} AS data, position FROM {self.item} "
            "WHERE branch_id = %s AND position > %s AND position <= %s "
            f"ORDER BY position DESC{window}) AS p"
        )
        params: list[Any] = []
        for segment in segments:
            params += [segment.branch_id, segment.after, segment.upto]
        parts = " UNION ALL ".join([part] * len(segments))
        if limit is not None:
            parts = f"SELECT * FROM ({parts}) AS line ORDER BY position DESC{window}"
        return parts, params

    def batch(self, items: Sequence[Item]) -> AnyBatch:
        return encode_batch(items)

    def narrowed(self, batch: AnyBatch, error: Exception) -> AnyBatch | None:
        """Return a batch without the characters that made it fail; None if none did."""
        return None

    def append(
        self,
        connection: BaseDatabaseWrapper,
        key: SessionKey,
        batch: AnyBatch,
        now: datetime,
    ) -> bool:
        """Store a batch; False, with nothing written, where no row lets it in.

        Needs a transaction around it unless `appends_alone`.
        """
        with self.cursor(connection) as cursor:
            if not self.appends_alone(connection, batch):
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
        self,
        connection: BaseDatabaseWrapper,
        calls: Sequence[tuple[SessionKey, AnyBatch]],
    ) -> list[bool] | None:
        """Store several batches in one transaction; None if one of them failed."""
        with self.cursor(connection) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                now = timezone.now()
                stored = [self._append(cursor, key, batch, now) for key, batch in calls]
            except ERRORS:
                _roll_back(cursor)
                return None
            except BaseException:
                _roll_back(cursor)
                raise
            try:
                cursor.execute("COMMIT")
            except BaseException:
                _roll_back(cursor)
                raise
        return stored

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: AnyBatch) -> bool:
        """Return whether append() needs no transaction around it."""
        if connection.connection is None:
            # Whoever appends connects, and tells where that fails.
            return bool(connection.settings_dict["AUTOCOMMIT"])
        return not connection.in_atomic_block and connection.autocommit

    def _append(
        self, cursor: CursorWrapper, key: SessionKey, batch: AnyBatch, now: datetime
    ) -> bool:
        place = self.advance(cursor, key, batch, now)
        if place is None:
            return False
        self.insert(cursor, place, batch, now)
        return True

    def advance(
        self, cursor: CursorWrapper, key: SessionKey, batch: AnyBatch, now: datetime
    ) -> Place | None:
        """Take the positions of a batch, holding the session's row from here on."""
        update, params = self.count(key, batch, now)
        # The first statement writes: a transaction that reads first loses its turn
        # to other writers and fails with "database is locked".
        today = self.adapt_date(now.date())
        cursor.execute(
            f"{update} RETURNING branch_id, id, active_on = %s", [*params, today]
        )
        row = cursor.fetchone()
        if row is None or row[0] is None:
            return None
        if not row[2]:
            cursor.execute(
                f"UPDATE {self.session} SET active_on = %s WHERE id = %s",
                [today, row[1]],
            )
        where, value = "id", row[0]
        if key.branch is not None:
            where, value = "session_id = %s AND version = 0 AND name", key.branch
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

    def count(self, key: SessionKey, batch: AnyBatch, now: datetime) -> Statement:
        """Return the update of the session's counters.

        It is guarded by owner and fence, and by the branch: a batch that finds no
        place must not be counted.
        """
        kind = (key.fence is not None, key.branch is not None)
        if (update := self._updates.get(kind)) is None:
            update = self._updates[kind] = self._counting(*kind)
        return (
            update,
            [
                len(batch),
                self.adapt_time(now),
                *([] if self.writes_all_indexes else [self.adapt_date(now.date())]),
                # What shows nothing gives way to words, and to nothing less.
                UNSEEN if batch.title else "",
                batch.title,
                *self.owner(key),
                *([] if key.fence is None else [key.fence]),
                *([] if key.branch is None else [key.branch]),
            ],
        )

    def _counting(self, is_fenced: bool, has_branch: bool) -> str:
        fence = f" AND {self.session}.fence = %s" if is_fenced else ""
        branch = f" AND {self.session}.branch_id IS NOT NULL"
        if has_branch:
            # Not EXISTS, which PostgreSQL may turn into a join of all rows.
            branch = (
                f" AND (SELECT {self.branch}.id FROM {self.branch} "
                f"WHERE {self.branch}.session_id = {self.session}.id "
                f"AND {self.branch}.name = %s AND version = 0 "
                "AND archived_at IS NULL) IS NOT NULL"
            )
        # Two indexes hold the day, which changes with a day's first write.
        day = "" if self.writes_all_indexes else "active_on = %s, "
        return (
            f"UPDATE {self.session} SET item_count = item_count + %s, "
            f"updated_at = %s, {day}"
            "title = CASE WHEN title IN ('', %s) THEN %s ELSE title END "
            f"WHERE {self.owned}{fence}{branch}"
            + self.sees_branch.format(s=self.session, b=self.branch)
        )

    def insert(
        self, cursor: CursorWrapper, place: Place, batch: AnyBatch, now: datetime
    ) -> None:
        self.insert_rows(cursor, self.values(place, batch, str(self.adapt_time(now))))

    def insert_rows(
        self, cursor: CursorWrapper, rows: Iterable[tuple[Any, ...]]
    ) -> None:
        """Insert rows of items, whose values are in the order of COLUMNS."""
        cursor.executemany(
            f"INSERT INTO {self.item} ({COLUMNS}) VALUES ({', '.join(['%s'] * 11)})",
            list(rows),
        )

    def values(
        self, place: Place, batch: AnyBatch, created_at: Any
    ) -> Iterator[tuple[Any, ...]]:
        branch, before = place.branch_id, place.turn
        for position, row in enumerate(batch, place.head + 1):
            data, turn, *drawn = row
            yield branch, position, before + turn, data, *drawn, len(data), created_at

    def can_be_awaited(self, connection: BaseDatabaseWrapper) -> bool:
        """Return whether a loop may await statements, as transport.postgresql does."""
        return False

    def take_newest(self, connection: BaseDatabaseWrapper, held: Held) -> str | None:
        """Delete the newest row of a held session's current branch; return its text.

        None, with nothing done, says that it takes a look first.
        """
        return None

    def lock(self, cursor: CursorWrapper, key: SessionKey) -> Held | None:
        """Hold the session's row to the transaction's end; None where it has none."""
        statement = self.locking.format(s=self.session, owned=self.owned)
        cursor.execute(statement, self.owner(key))
        row = cursor.fetchone()
        return None if row is None else Held(*row)


def _roll_back(cursor: CursorWrapper) -> None:
    try:
        cursor.execute("ROLLBACK")
    except ERRORS:
        # SQLite has done so by itself, or never will.
        cursor.db.close()
