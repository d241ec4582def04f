"""Sources of two tables: sessions, and their messages one a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

from agent_sessions.importing.databases import (
    Database,
    Garbled,
    as_text,
    as_time,
    as_value,
)
from agent_sessions.importing.records import (
    Mark,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
    UnreadableSource,
    after_mark,
)
from agent_sessions.models import MAIN_BRANCH

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

    @property
    def session_columns(self) -> set[str]:
        """Name the columns of sessions that are read."""
        return {self.key, "session_id", "created_at", "updated_at"}

    @property
    def message_columns(self) -> set[str]:
        """Name the columns of messages that are read."""
        return {"id", self.reference, self.data, "created_at"}


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
        self._probe(kind)

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
            session = SourceSession(
                session_id,
                as_time(created_at, self.zone),
                as_time(updated_at, self.zone),
                key=key,
            )
            yield _garbled(session_id) or session
        for session_id in self._without_row():
            if not self.only or session_id in self.only:
                session = SourceSession(session_id, key=session_id)
                yield _garbled(session_id) or session

    def grown(self, session: SourceSession, marks: Mapping[str, Mark]) -> set[str]:
        mark = marks.get(MAIN_BRANCH, Mark())
        return {MAIN_BRANCH} if self._new_ids(session.key, mark) else set()

    def items(
        self, session: SourceSession, branch: SourceBranch, mark: Mark
    ) -> Iterator[list[SourceItem]]:
        return self._pages(self._new_ids(session.key, mark))

    def close(self) -> None:
        self.database.close()

    def _probe(self, kind: str) -> None:
        """See that the tables are of the kind. Raises UnreadableSource."""
        sessions = self.database.columns(self._sessions)
        messages = self.database.columns(self._messages)
        missing = sorted(
            {f"{self._sessions}.{c}" for c in self.layout.session_columns - sessions}
            | {f"{self._messages}.{c}" for c in self.layout.message_columns - messages}
        )
        if not missing:
            return
        others = [
            other
            for other, layout in LAYOUTS.items()
            if layout.session_columns <= sessions and layout.message_columns <= messages
        ]
        advice = (
            f"They are those of {' or '.join(others)}: name that KIND."
            if others
            else "See that the KIND, --sessions-table and --messages-table fit."
        )
        raise UnreadableSource(
            f"The tables of {self.database.name} aren't those of {kind}: there is no "
            f"{' and no '.join(missing)}. {advice}"
        )

    def _session_rows(self) -> Iterator[tuple[Any, ...]]:
        database, key = self.database, self.layout.key
        columns = (
            f"{database.value(key)}, {database.value('session_id')}, "
            f"{database.time('created_at')}, {database.time('updated_at')}"
        )
        where = ["1 = 1"]
        if self.only:
            where = [f"session_id IN ({database.marks(self.only)})"]
        params: list[Any] = list(self.only)
        last: list[Any] = []
        mark = database.mark
        while True:
            after = [f"{key} > {mark}"] if last else []
            rows = database.rows(
                f"SELECT {columns} FROM {self._sessions} "
                f"WHERE {' AND '.join(where + after)} ORDER BY {key} LIMIT {SESSIONS}",
                [*params, *last],
            )
            for raw, of_key, raw_id, of_id, *times in rows:
                yield as_value(raw, of_key), as_value(raw_id, of_id), *times
            if len(rows) < SESSIONS:
                return
            last = [as_value(*rows[-1][:2])]
            # Bytes that are no UTF-8 compare as the text that they stand for.
            is_garbled = isinstance(last[0], Garbled)
            mark = f"CAST({database.mark} AS TEXT)" if is_garbled else database.mark

    def _without_row(self) -> list[Any]:
        """Name the sessions that only messages tell of: SQLite keeps no foreign key."""
        if self.database.vendor != "sqlite" or self.layout.key == "id":
            return []
        return [
            as_value(raw, of_name)
            for raw, of_name in self.database.rows(
                f"SELECT DISTINCT {self.database.value('m.session_id')} "
                f"FROM {self._messages} m WHERE NOT EXISTS (SELECT 1 FROM "
                f"{self._sessions} s WHERE s.session_id = m.session_id)"
            )
        ]

    def _new_ids(self, key: Any, mark: Mark) -> array[int]:
        return after_mark(self._ids(key), mark, "the session")

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


def _garbled(session_id: Any) -> SourceSession | None:
    """Refuse an id that is no text, by what can be read of it."""
    if not isinstance(session_id, Garbled):
        return None
    return SourceSession(
        as_text(bytes(session_id)),
        problem="its id is no UTF-8. Change it in the source, in both tables.",
    )
