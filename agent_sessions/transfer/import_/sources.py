"""The kinds of sources, by the names that the command takes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, tzinfo

from agent_sessions.transfer.import_.advanced import AdvancedSource
from agent_sessions.transfer.import_.exported import ExportSource
from agent_sessions.transfer.import_.records import Source, UnreadableSource
from agent_sessions.transfer.import_.sqlite import open_database
from agent_sessions.transfer.import_.tables import TableSource

KINDS = {
    "sqlite": "the SDK's SQLiteSession and AsyncSQLiteSession",
    "advanced-sqlite": "the SDK's AdvancedSQLiteSession",
    "sqlalchemy": "the SDK's SQLAlchemySession",
    "openai-django": "openai-django-sessions",
    "export": "our own export, agent-sessions/1",
}


def open_source(
    kind: str,
    place: str,
    *,
    sessions_table: str = "agent_sessions",
    messages_table: str = "agent_messages",
    zone: tzinfo | None = None,
    only: Sequence[str] = (),
) -> Source:
    """Open a source: a file, or an alias of DATABASES. Raises UnreadableSource.

    `zone` is that of times without an offset: UTC if none is given, and in our own
    export the project's TIME_ZONE. `only` names the sessions wanted.
    """
    if kind not in KINDS:
        raise UnreadableSource(
            f"There is no kind {kind!r} of source; there are: {', '.join(KINDS)}."
        )
    if kind == "export":
        return ExportSource(place, zone=zone, only=only)
    database = open_database(place)
    if kind == "advanced-sqlite":
        if database.vendor != "sqlite":
            raise UnreadableSource("AdvancedSQLiteSession has its tables in SQLite.")
        make: type[TableSource] = AdvancedSource
    else:
        make = TableSource
    try:
        return make(
            database,
            "sqlite" if kind == "advanced-sqlite" else kind,
            sessions_table=sessions_table,
            messages_table=messages_table,
            zone=zone or UTC,
            only=only,
        )
    except UnreadableSource:
        database.close()
        raise
