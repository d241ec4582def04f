"""Sources of two tables: sessions, and their messages one a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

from agent_sessions.importing.databases import Database, as_text, as_time
from agent_sessions.importing.records import (
    Mark,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
    after_mark,
)

# Sessions of one query.
SESSIONS = 500
# Rows of one query: few where they are long, so that memory stays bounded.
FIRST_PAGE = 50
MOST_ROWS = 500
PAGE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tables of one kind are laid out."""

    # The sessions' key, and the messages' column that refers to it.
    key: str
    reference: str
    data: str
    # The order in which the source's own class reads the messages.
    order: str


LAYOUTS = {
    "sqlite": Layout("session_id", "session_id", "message_data", "id"),
    "sqlalchemy": Layout("session_id", "session_id", "message_data", "created_at, id"),
    "openai-django": Layout("id", "session_id", "data", "created_at, id"),
}


class TableSource(Source):
    """Sessions in the tables of the SDK's or of openai-django-sessions' classes."""

    def __init__(
        self,
        database: Database,
        kind: str,
        *,
        sessions_table: str = "agent_sessions",
        messages_table: str = "agent_messages",
        zone: tzinfo,
        only: Sequence[str] = (),
    ) -> None:
        self.database = database
        self.layout = LAYOUTS[kind]
        self.name = f"{kind}:{database.name}:{sessions_table}:{messages_table}"
        self.zone = zone
        self.only = tuple(dict.fromkeys(only))
        self._sessions = database.quote(sessions_table)
        self._messages = database.quote(messages_table)

    def total(self) -> int | None:
        sql = f"SELECT COUNT(*) FROM {self._messages} m"
        if self.only:
            sql += (
                f" JOIN {self._sessions} s ON s.{self.layout.key} = "
                f"m.{self.layout.reference} WHERE "
                f"s.session_id IN ({self.database.marks(self.only)})"
            )
        return int(self.database.rows(sql, self.only)[0][0])

    def sessions(self) -> Iterator[SourceSession]:
        for key, session_id, created_at, updated_at in self._session_rows():
            yield SourceSession(
                session_id,
                as_time(created_at, self.zone),
                as_time(updated_at, self.zone),
                key=key,
            )
        for session_id in self._without_row():
            if not self.only or session_id in self.only:
                yield SourceSession(session_id, key=session_id)

    def items(
        self, session: SourceSession, branch: SourceBranch, mark: Mark
    ) -> Iterator[list[SourceItem]]:
        ids = after_mark(self._ids(session.key), mark, "the session")
        return self._pages(ids)

    def close(self) -> None:
        self.database.close()

    def _session_rows(self) -> Iterator[tuple[Any, ...]]:
        database, key = self.database, self.layout.key
        columns = (
            f"{key}, session_id, {database.time('created_at')}, "
            f"{database.time('updated_at')}"
        )
        where = ["1 = 1"]
        if self.only:
            where = [f"session_id IN ({database.marks(self.only)})"]
        params: list[Any] = list(self.only)
        last: list[Any] = []
        while True:
            after = [f"{key} > {database.mark}"] if last else []
            rows = database.rows(
                f"SELECT {columns} FROM {self._sessions} "
                f"WHERE {' AND '.join(where + after)} ORDER BY {key} LIMIT {SESSIONS}",
                [*params, *last],
            )
            yield from rows
            if len(rows) < SESSIONS:
                return
            last = [rows[-1][0]]

    def _without_row(self) -> list[Any]:
        """Name the sessions that only messages tell of: SQLite keeps no foreign key."""
        if self.database.vendor != "sqlite" or self.layout.key == "id":
            return []
        return [
            name
            for (name,) in self.database.rows(
                f"SELECT DISTINCT session_id FROM {self._messages} WHERE session_id "
                f"NOT IN (SELECT session_id FROM {self._sessions})"
            )
        ]

    def _ids(self, key: Any) -> array[int]:
        """Give the ids of a session's messages in their order, 8 bytes each."""
        return self.database.ids(
            f"SELECT id FROM {self._messages} WHERE {self.layout.reference} = "
            f"{self.database.mark} ORDER BY {self.layout.order}",
            [key],
        )

    def _pages(self, ids: array[int]) -> Iterator[list[SourceItem]]:
        database = self.database
        start, size = 0, FIRST_PAGE
        while start < len(ids):
            page = ids[start : start + size]
            rows = database.rows(
                f"SELECT id, {database.raw(self.layout.data)}, "
                f"{database.time('created_at')} FROM {self._messages} "
                f"WHERE id IN ({database.marks(page)})",
                page,
            )
            found = {
                pk: SourceItem(pk, as_text(data), as_time(created_at, self.zone))
                for pk, data, created_at in rows
            }
            # Removed since the ids were read: as if it had been before.
            yield [found[pk] for pk in page if pk in found]
            start += len(page)
            length = sum(len(item.data) for item in found.values()) // len(page)
            size = max(1, min(MOST_ROWS, size * 4, PAGE_BYTES // max(length, 1)))
