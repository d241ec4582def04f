"""Sources of two tables: sessions, and their messages one a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

from agent_sessions.models import MAIN_BRANCH
from agent_sessions.transfer.import_.databases import (
    ITEM_BYTES,
    Database,
    Garbled,
    TooLong,
    as_text,
    as_time,
    as_value,
)
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    Mark,
    Source,
    SourceBranch,
    SourceItem,
    SourceSession,
    UnreadableSource,
    after_mark,
    changed,
    extend,
)

# Sessions of one query.
SESSIONS = 500
# Rows and bytes of one query for messages.
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

    # Tables beside those of sessions and messages, which may be missing.
    more_tables: tuple[str, ...] = ()

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
        database.expect((sessions_table, messages_table, *self.more_tables))
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
        new = self._proved(self._ids(session.key), mark, "the session")
        return {MAIN_BRANCH} if new else set()

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
        where, params = "1 = 1", list[Any]()
        if self.only:
            where = f"session_id IN ({database.marks(self.only)})"
            params = list(self.only)
        for raw, of_key, raw_id, of_id, *times in self._rows_by(
            key,
            f"SELECT {database.value(key)}, {database.value('session_id')}, "
            f"{database.time('created_at')}, {database.time('updated_at')} "
            f"FROM {self._sessions} WHERE {where}",
            params,
        ):
            yield as_value(raw, of_key), as_value(raw_id, of_id), *times

    def _rows_by(
        self, key: str, sql: str, params: Sequence[Any] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Return the rows of a query, in pages; each begins with its key."""
        database = self.database
        after, last = "", list[Any]()
        while True:
            rows = database.rows(
                f"{sql}{after} ORDER BY {key} LIMIT {SESSIONS}", [*params, *last]
            )
            yield from rows
            if len(rows) < SESSIONS:
                return
            last = [as_value(*rows[-1][:2])]
            # Bytes that are no UTF-8 compare as the text that they stand for.
            is_garbled = isinstance(last[0], Garbled)
            mark = f"CAST({database.mark} AS TEXT)" if is_garbled else database.mark
            after = f" AND {key} > {mark}"

    def _without_row(self) -> Iterator[Any]:
        """Name the sessions that only messages tell of: SQLite keeps no foreign key."""
        if self.database.vendor != "sqlite" or self.layout.key == "id":
            return
        for raw, of_name in self._rows_by(
            "m.session_id",
            f"SELECT DISTINCT {self.database.value('m.session_id')} "
            f"FROM {self._messages} m WHERE NOT EXISTS (SELECT 1 FROM "
            f"{self._sessions} s WHERE s.session_id = m.session_id)",
        ):
            yield as_value(raw, of_name)

    def _new_ids(self, key: Any, mark: Mark) -> array[int]:
        return after_mark(self._ids(key), mark, "the session")

    def _proved(self, ids: array[int], mark: Mark, what: str) -> array[int]:
        """Return the ids after a mark, once what is before them is what was taken.

        Raises ImportProblem.
        """
        new = after_mark(ids, mark, what)
        digest = ""
        for page in self._pages(ids[: mark.count]):
            digest = extend(digest, page)
        if digest != mark.digest:
            raise changed(what)
        return new

    def _ids(self, key: Any) -> array[int]:
        """Return the ids of a session's messages in their order, 8 bytes each."""
        return self.database.ids(
            f"SELECT id FROM {self._messages} WHERE {self.layout.reference} = "
            f"{self.database.mark} ORDER BY {self.layout.order}",
            [key],
        )

    def _pages(self, ids: array[int]) -> Iterator[list[SourceItem]]:
        """Return pages of items. Raises ImportProblem before the first one."""
        return self._read(ids, self._sizes(ids))

    def _sizes(self, ids: array[int]) -> array[int]:
        """Return the bytes of messages. Raises ImportProblem if one is too long."""
        sizes = array("q")
        for start in range(0, len(ids), MOST_ROWS):
            page = ids[start : start + MOST_ROWS]
            try:
                found = self._sizes_of(page)
            except TooLong:
                # By itself, each tells whether it is the one.
                found = {}
                for pk in page:
                    try:
                        found |= self._sizes_of((pk,))
                    except TooLong:
                        found[pk] = ITEM_BYTES + 1
            for pk in page:
                size = found.get(pk) or 0
                if size > ITEM_BYTES:
                    raise ImportProblem(
                        f"its message {pk} has more than {ITEM_BYTES:,} bytes. Shorten "
                        "or delete it in the source."
                    )
                sizes.append(size)
        return sizes

    def _sizes_of(self, ids: Sequence[int]) -> dict[int, int]:
        rows = self.database.rows(
            f"SELECT id, {self.database.size(self.layout.data)} "
            f"FROM {self._messages} WHERE id IN ({self.database.marks(ids)})",
            ids,
            longest=ITEM_BYTES,
        )
        return dict(rows)

    def _read(self, ids: array[int], sizes: array[int]) -> Iterator[list[SourceItem]]:
        """Read items, few at a time where they are long: memory stays bounded."""
        start = 0
        while start < len(ids):
            end, length = start + 1, sizes[start]
            while end < len(ids) and end - start < MOST_ROWS:
                length += sizes[end]
                if length > PAGE_BYTES:
                    break
                end += 1
            yield self._items_of(ids[start:end])
            start = end

    def _items_of(self, ids: Sequence[int]) -> list[SourceItem]:
        database = self.database
        rows = database.rows(
            f"SELECT id, {database.raw(self.layout.data)}, "
            f"{database.time('created_at')} FROM {self._messages} "
            f"WHERE id IN ({database.marks(ids)})",
            ids,
            longest=ITEM_BYTES,
        )
        found = {
            pk: SourceItem(pk, as_text(data), as_time(created_at, self.zone))
            for pk, data, created_at in rows
        }
        # Removed since the ids were read: as if it had been before.
        return [found[pk] for pk in ids if pk in found]


def _garbled(session_id: Any) -> SourceSession | None:
    """Refuse an id that is no text, by what can be read of it."""
    if not isinstance(session_id, Garbled):
        return None
    return SourceSession(
        as_text(bytes(session_id)),
        problem="its id is no UTF-8. Change it in the source, in both tables.",
    )
