"""The hot path's statements in the words of MariaDB and MySQL."""

from __future__ import annotations

from datetime import datetime

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.sql.base import AnyBatch, Place, Statements
from agent_sessions.items import Batch, EncodedItem

# What a character is refused with that a column's set lacks: wrong value for a field,
# illegal mix of collations, and MySQL's impossible conversion of a parameter.
_UNHELD = frozenset({1366, 1267, 3988})


def _as_ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


class MySQLStatements(Statements):
    """MariaDB and MySQL have no UPDATE … RETURNING: update first, then look."""

    same_owner = "{s}.user_id <=> %s"
    encoded_data = "data"
    locking = "SELECT id, branch_id FROM {s} WHERE {owned} FOR UPDATE"
    writes_all_indexes = False

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: AnyBatch) -> bool:
        return False

    def narrowed(self, batch: AnyBatch, error: Exception) -> AnyBatch | None:
        number = getattr(error, "number", None)
        if number not in _UNHELD and not isinstance(error, UnicodeEncodeError):
            return None
        # The item itself is ASCII; the columns drawn from it may be no more.
        rows = tuple(
            EncodedItem(data, turn, *map(_as_ascii, words))
            for data, turn, *words in batch
        )
        return Batch(rows, batch.turns, _as_ascii(batch.title))

    def advance(
        self, cursor: CursorWrapper, key: SessionKey, batch: AnyBatch, now: datetime
    ) -> Place | None:
        update, params = self.count(key, batch, now)
        cursor.execute(update, params)
        if not cursor.rowcount:
            return None
        branch, branch_params = self.branch_of(key)
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
