"""The hot path's statements in the words of MariaDB and MySQL."""

from __future__ import annotations

from datetime import datetime

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.statements import (
    AnyBatch,
    Held,
    Place,
    Statements,
    held,
)


class MySQLStatements(Statements):
    """MariaDB and MySQL have no UPDATE … RETURNING: update first, then look."""

    same_owner = "{s}.user_id <=> %s"
    encoded_data = "data"
    appends_together = False
    writes_all_indexes = False

    def cursor(self, connection: BaseDatabaseWrapper) -> CursorWrapper:
        return connection.cursor()

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: AnyBatch) -> bool:
        return False

    def advance(
        self, cursor: CursorWrapper, key: SessionKey, batch: AnyBatch, now: datetime
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

    def lock(self, cursor: CursorWrapper, key: SessionKey) -> Held | None:
        cursor.execute(
            f"SELECT id, branch_id FROM {self.session} WHERE {self.owned} FOR UPDATE",
            self.owner(key, cursor.db),
        )
        return held(cursor.fetchone())
