"""The hot path's statements in the words of MariaDB and MySQL."""

from __future__ import annotations

from datetime import datetime

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.sql.base import (
    AnyBatch,
    Place,
    Statements,
)
from agent_sessions.fields import CHARSET
from agent_sessions.items import Batch, EncodedItem
from agent_sessions.models import AgentSession, SessionItem

# What a character is refused with that a column's set lacks: wrong value for a field,
# illegal mix of collations, and MySQL's impossible conversion of a parameter.
_UNHELD = frozenset({1366, 1267, 3988})
# The columns drawn from an item, which itself is ASCII.
_WORDS = ("type", "role", "call_id", "tool_name", "text")
# Python's names of character sets, where they differ.
_CODECS = {"latin1": "cp1252"}
_LAST_OF_THREE_BYTES = "\uffff"


class _Held:
    """What the connection and the columns of a database can hold of a text."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        options = connection.settings_dict.get("OPTIONS") or {}
        self._spoken = str(options.get("charset", CHARSET))
        tables = (SessionItem._meta.db_table, AgentSession._meta.db_table)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT column_name, character_set_name FROM "
                "information_schema.columns WHERE table_schema = DATABASE() "
                "AND (table_name = %s OR table_name = %s AND column_name = 'title')",
                tables,
            )
            self._charsets: dict[str, str] = dict(cursor.fetchall())

    def of(self, column: str, text: str) -> str:
        """Return a text with a mark in the place of each character that is lost."""
        for charset in (self._charsets.get(column) or CHARSET, self._spoken):
            text = _within(charset, text)
        return text


def _within(charset: str, text: str) -> str:
    if charset == CHARSET or text.isascii():
        return text
    if charset in {"utf8", "utf8mb3", "ucs2"}:
        return "".join(c if c <= _LAST_OF_THREE_BYTES else "\ufffd" for c in text)
    codec = _CODECS.get(charset, charset)
    try:
        return text.encode(codec, "replace").decode(codec)
    except LookupError:
        return text.encode("ascii", "replace").decode()


class MySQLStatements(Statements):
    """MariaDB and MySQL have no UPDATE … RETURNING: update first, then look."""

    same_owner = "{s}.user_id <=> %s"
    encoded_data = "data"
    locking = "SELECT id, branch_id FROM {s} WHERE {owned} FOR UPDATE"
    writes_all_indexes = False

    def appends_alone(self, connection: BaseDatabaseWrapper, batch: AnyBatch) -> bool:
        return False

    def narrowed(
        self, connection: BaseDatabaseWrapper, batch: AnyBatch, error: Exception
    ) -> AnyBatch | None:
        number = getattr(error, "number", None)
        if number not in _UNHELD and not isinstance(error, UnicodeEncodeError):
            return None
        held = _Held(connection)
        rows = tuple(
            EncodedItem(
                row.data,
                row.turn,
                *(held.of(name, getattr(row, name)) for name in _WORDS),
            )
            for row in batch
        )
        return Batch(rows, batch.turns, held.of("title", batch.title))

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
