"""Sources of two tables: sessions, and their messages one a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from functools import cached_property
from typing import Any

from agent_sessions.backends.keys import is_text
from agent_sessions.transfer.import_.databases import Database, TooLong
from agent_sessions.transfer.import_.records import (
    ITEM_BYTES,
    PAGE_BYTES,
    PAGE_ROWS,
    BreaksOff,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
    UnreadableSource,
    as_text,
    as_time,
    read_item,
)

# Sessions of one query.
SESSIONS = 500
_SESSION_COLUMNS = frozenset({"session_id", "created_at", "updated_at"})
# The kinds whose messages have their items in a column of this name.
_KINDS_BY_DATA = {"message_data": "sqlite or sqlalchemy", "data": "openai-django"}


class TableSource(Source):
    """Sessions in the tables of SQLiteSession or SQLAlchemySession."""

    kind = "sqlite"
    # The column of the messages' items.
    data = "message_data"
    # The order in which the source's own class reads the messages.
    order = "id"
    # Whether only messages may tell of a session.
    has_orphans = True
    # Tables beside those of sessions and messages, which may be missing.
    more_tables: tuple[str, ...] = ()

    def __init__(
        self,
        database: Database,
        *,
        sessions_table: str,
        messages_table: str,
        zone: tzinfo,
        only: Sequence[str] = (),
    ) -> None:
        self.database = database
        self.name = f"{self.kind}:{database.name}:{sessions_table}:{messages_table}"
        self.zone = zone
        self.only = tuple(dict.fromkeys(only))
        self._sessions = database.quote(sessions_table)
        self._messages = database.quote(messages_table)
        database.expect((sessions_table, messages_table, *self.more_tables))
        self._probe()

    def total(self, done: int) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        sql = f"SELECT COUNT(*) FROM {self._messages}"
        if self.only:
            sql += f" WHERE {self._of(self.only)}"
        return int(self.database.rows(sql, self.only)[0][0])

    def sessions(self) -> Iterator[SourceSession]:
        where, params = "1 = 1", list[Any]()
        if self.only:
            where = f"session_id IN ({self.database.marks(self.only)})"
            params = list(self.only)
        for session_id, created_at, updated_at in self._rows_by(
            "session_id",
            "SELECT session_id, created_at, updated_at "
            f"FROM {self._sessions} WHERE {where}",
            params,
        ):
            yield SourceSession(
                session_id,
                as_time(created_at, self.zone),
                as_time(updated_at, self.zone),
            )
        if not self.has_orphans or self.database.vendor != "sqlite":
            return
        # SQLite keeps no foreign key: some sessions only messages tell of.
        for (session_id,) in self._rows_by(
            "m.session_id",
            f"SELECT DISTINCT m.session_id FROM {self._messages} m WHERE NOT EXISTS "
            f"(SELECT 1 FROM {self._sessions} s WHERE s.session_id = m.session_id)",
        ):
            if not self.only or session_id in self.only:
                yield SourceSession(session_id)

    def items(
        self, session: SourceSession, branch: SourceBranch, after: int = 0
    ) -> Iterator[list[SourceItem]]:
        return self.pages(self.ids_of(session.session_id)[after:])

    def close(self) -> None:
        self.database.close()

    def ids_of(self, session_id: Any) -> array[int]:
        """Return the ids of a session's messages in their order, 8 bytes each."""
        return self.database.ids(
            f"SELECT id FROM {self._messages} WHERE {self._of([session_id])} "
            f"ORDER BY {self.order}",
            [session_id],
        )

    def pages(self, ids: array[int]) -> Iterator[list[SourceItem]]:
        """Return pages of messages, short ones where they are long."""
        for start in range(0, len(ids), PAGE_ROWS):
            wanted = ids[start : start + PAGE_ROWS]
            page: list[SourceItem] = []
            size = 0
            rows = self.database.stream(
                f"SELECT {self.data}, created_at FROM {self._messages} "
                f"WHERE id IN ({self.database.marks(wanted)}) ORDER BY {self.order}",
                wanted,
                longest=ITEM_BYTES,
            )
            try:
                for data, created_at in rows:
                    text = as_text(data)
                    if len(text) > ITEM_BYTES:
                        raise TooLong
                    page.append(read_item(text, as_time(created_at, self.zone)))
                    size += len(text)
                    if size > PAGE_BYTES:
                        yield page
                        page, size = [], 0
            except TooLong:
                yield page
                raise BreaksOff(
                    f"one of its messages has more than {ITEM_BYTES:,} bytes. What came "
                    "before is imported."
                ) from None
            yield page

    def _of(self, session_ids: Sequence[Any]) -> str:
        return f"session_id IN ({self.database.marks(session_ids)})"

    def _probe(self) -> None:
        messages = self.database.columns(self._messages)
        lacking = {
            self._sessions: _SESSION_COLUMNS - self.database.columns(self._sessions),
            self._messages: {"id", "session_id", self.data, "created_at"} - messages,
        }
        missing = sorted(f"{table}.{c}" for table in lacking for c in lacking[table])
        if not missing:
            return
        advice = "See that the KIND, --sessions-table and --messages-table fit."
        for data in _KINDS_BY_DATA.keys() & messages - {self.data}:
            advice = f"They are those of {_KINDS_BY_DATA[data]}: name that KIND."
        raise UnreadableSource(
            f"The tables of {self.database.name} aren't those of {self.kind}: there is "
            f"no {' and no '.join(missing)}. {advice}"
        )

    def _rows_by(
        self, key: str, sql: str, params: Sequence[Any] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Return the rows of a query, in pages; each begins with its key."""
        after, last = "", list[Any]()
        while True:
            rows = self.database.rows(
                f"{sql}{after} ORDER BY {key} LIMIT {SESSIONS}", [*params, *last]
            )
            yield from rows
            if len(rows) < SESSIONS:
                return
            last, mark = [rows[-1][0]], self.database.mark
            if isinstance(last[0], str) and not is_text(last[0]):
                # Bytes that are no UTF-8 compare as the text that they stand for.
                last = [last[0].encode("utf-8", "surrogateescape")]
                mark = f"CAST({mark} AS TEXT)"
            after = f" AND {key} > {mark}"


class SQLAlchemySource(TableSource):
    """The tables of SQLAlchemySession, which reads its messages by time."""

    kind = "sqlalchemy"
    order = "created_at, id"


class DjangoSource(TableSource):
    """The tables of the package openai-django-sessions."""

    kind = "openai-django"
    data = "data"
    order = "created_at, id"
    has_orphans = False

    def _of(self, session_ids: Sequence[Any]) -> str:
        sessions = f"SELECT id FROM {self._sessions} WHERE {super()._of(session_ids)}"
        return f"session_id IN ({sessions})"
