"""What can be wrong with a Django database that holds sessions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections
from django.db.models import Field

from agent_sessions.fields import (
    CHARSET,
    ExactCharField,
    WideCharField,
    WideTextField,
)

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from agent_sessions.backends.database.backend import DatabaseBackend

# Seconds that a writer waits for others before "database is locked".
SQLITE_TIMEOUT = 20
SQLITE_DEFAULT_TIMEOUT = 5
# psycopg_pool's own.
POOL_MIN_SIZE = 4
_WAL = re.compile(r"journal_mode\s*=\s*['\"]?wal", re.IGNORECASE)
# The two bytes of an SQLite file's header that say WAL.
_WAL_AT, _WAL_MARK = 18, b"\x02\x02"
# What SQLite and PostgreSQL are asked for: the columns that compare otherwise than by
# their bytes, with what they compare by. SQLite tells it of indexes alone.
_SQLITE = """
SELECT tables.name, columns.name, columns.coll
FROM sqlite_master AS tables, pragma_index_list(tables.name) AS indexes,
    pragma_index_xinfo(indexes.name) AS columns
WHERE tables.type = 'table' AND columns.name IS NOT NULL AND columns.coll <> 'BINARY'
"""
_POSTGRESQL = """
SELECT tables.relname, columns.attname,
    CASE WHEN types.typname = 'citext' THEN 'citext' ELSE collations.collname END
FROM pg_attribute AS columns
JOIN pg_class AS tables ON tables.oid = columns.attrelid
JOIN pg_type AS types ON types.oid = columns.atttypid
LEFT JOIN pg_collation AS collations ON collations.oid = columns.attcollation
WHERE tables.relkind = 'r' AND pg_table_is_visible(tables.oid)
    AND (types.typname = 'citext' OR NOT collations.collisdeterministic)
"""
_MYSQL = """
SELECT table_name, column_name, collation_name, character_set_name
FROM information_schema.columns
WHERE table_schema = DATABASE() AND collation_name IS NOT NULL
"""


def check_database(backend: DatabaseBackend) -> list[CheckMessage]:
    """Report settings under which a store loses speed or writes."""
    connection = connections[backend.using]
    check = _CHECKS.get(connection.vendor)
    if check is None:
        return [
            Error(
                f"AGENT_SESSIONS[{backend.alias!r}]: {connection.display_name} is not "
                "supported.",
                hint="Let the option database name a PostgreSQL, SQLite, MariaDB or "
                "MySQL database.",
                id="agent_sessions.E015",
            )
        ]
    return check(backend, connection, connection.settings_dict.get("OPTIONS") or {})


def _check_sqlite(
    backend: DatabaseBackend, connection: BaseDatabaseWrapper, options: dict[str, Any]
) -> list[CheckMessage]:
    if connection.is_in_memory_db():  # type: ignore[attr-defined]
        return []
    where = f"DATABASES[{backend.using!r}]"
    hint = f"Set {where}['OPTIONS'] to include"
    messages: list[CheckMessage] = []
    mode = str(options.get("transaction_mode") or "").upper()
    if mode not in {"IMMEDIATE", "EXCLUSIVE"}:
        messages.append(
            Warning(
                f"{where} is an SQLite database without immediate transactions, so "
                'concurrent writers fail with "database is locked".',
                hint=f'{hint} "transaction_mode": "IMMEDIATE".',
                id="agent_sessions.W001",
            )
        )
    if not (_WAL.search(str(options.get("init_command", ""))) or _has_wal(connection)):
        messages.append(
            Warning(
                f"{where} is an SQLite database without a write-ahead log, so readers "
                "and writers wait for each other.",
                hint=f'{hint} "init_command": "PRAGMA journal_mode=WAL;".',
                id="agent_sessions.W002",
            )
        )
    timeout = options.get("timeout", SQLITE_DEFAULT_TIMEOUT)
    if not isinstance(timeout, (int, float)) or timeout < SQLITE_TIMEOUT:
        messages.append(
            Warning(
                f"{where} is an SQLite database whose writers wait for only "
                f"{timeout} seconds.",
                hint=f'{hint} "timeout": {SQLITE_TIMEOUT}.',
                id="agent_sessions.W003",
            )
        )
    return messages


def _has_wal(connection: BaseDatabaseWrapper) -> bool:
    """Look into the file: a database in WAL mode stays in it."""
    try:
        with Path(str(connection.settings_dict["NAME"])).open("rb") as file:
            file.seek(_WAL_AT)
            return file.read(2) == _WAL_MARK
    except (OSError, ValueError):
        # No file yet, or a name that is no path: nobody has switched it on.
        return False


def _check_mysql(
    backend: DatabaseBackend, connection: BaseDatabaseWrapper, options: dict[str, Any]
) -> list[CheckMessage]:
    charset = options.get("charset", "utf8mb4")
    if charset == "utf8mb4":
        return []
    where = f"DATABASES[{backend.using!r}]"
    return [
        Warning(
            f"{where} is spoken to in {charset}, which has no emoji: a message that "
            "holds one can't be stored.",
            hint=f'Set {where}[\'OPTIONS\']["charset"] to "utf8mb4", or leave it out.',
            id="agent_sessions.W004",
        )
    ]


def _check_postgresql(
    backend: DatabaseBackend, connection: BaseDatabaseWrapper, options: dict[str, Any]
) -> list[CheckMessage]:
    pool = options.get("pool")
    if not pool:
        return []
    pool = pool if isinstance(pool, dict) else {}
    size = pool.get("max_size") or pool.get("min_size", POOL_MIN_SIZE)
    threads = backend.threads.size
    shared = backend.options["connections"] == "request"
    if shared or not isinstance(size, int) or threads < size:
        return []
    where = f"DATABASES[{backend.using!r}]"
    return [
        Warning(
            f"{where} has a pool of {size} connections, and the {threads} threads of "
            f"AGENT_SESSIONS[{backend.alias!r}] may use all of them at once: requests "
            "of the site then wait.",
            hint=f"Set {where}['OPTIONS'][\"pool\"] to a max_size of {threads} and as "
            "many as the site's own requests need at once, or the backend's option "
            "threads to fewer.",
            id="agent_sessions.W006",
        )
    ]


_CHECKS: dict[str, Callable[[Any, Any, dict[str, Any]], list[CheckMessage]]] = {
    "sqlite": _check_sqlite,
    "mysql": _check_mysql,
    "postgresql": _check_postgresql,
}


# -- whether columns still are as the app's fields ask for ----------------------------


class Column(NamedTuple):
    """A column of a table, and what the database says of it."""

    table: str
    field: Field[Any, Any]
    found: str

    def __str__(self) -> str:
        return f"{self.table}.{self.field.column}"


def check_columns(using: str) -> list[CheckMessage]:
    """Report columns that take two ids for one, or can't hold every character."""
    connection = connections[using]
    check = {"sqlite": _sqlite, "postgresql": _postgresql, "mysql": _mysql}.get(
        connection.vendor
    )
    return [] if check is None else check(connection)


def _sqlite(connection: BaseDatabaseWrapper) -> list[CheckMessage]:
    found = _known(_rows(connection, _SQLITE), _is_exact)
    return _folding(
        connection,
        found,
        lambda column: "Make the table anew without COLLATE at this column.",
    )


def _postgresql(connection: BaseDatabaseWrapper) -> list[CheckMessage]:
    found = _known(_rows(connection, _POSTGRESQL), _is_exact)
    return _folding(
        connection,
        found,
        lambda column: (
            f"ALTER TABLE {column.table} ALTER COLUMN {column.field.column} TYPE "
            f'{column.field.db_type(connection)} COLLATE "default";'
        ),
    )


def _mysql(connection: BaseDatabaseWrapper) -> list[CheckMessage]:
    rows = _rows(connection, _MYSQL)
    exact = [
        column
        for column in _known((row[:3] for row in rows), _is_exact)
        if column.found != column.field.db_parameters(connection)["collation"]
    ]
    narrow = [
        column
        for column in _known(((*row[:2], row[3]) for row in rows), _is_words)
        if column.found != CHARSET
    ]
    messages = _folding(connection, exact, lambda column: _modify(connection, column))
    if narrow:
        names = ", ".join(sorted({column.found for column in narrow}))
        messages.append(
            Warning(
                f"DATABASES[{connection.alias!r}] keeps texts as {names}, which has no "
                "emoji: titles and the texts of lists lose them.",
                # Not CONVERT TO, which would change the columns of ids too.
                hint=" ".join(_modify(connection, column) for column in narrow),
                id="agent_sessions.W005",
            )
        )
    return messages


def _folding(
    connection: BaseDatabaseWrapper,
    columns: Sequence[Column],
    cure: Callable[[Column], str],
) -> list[CheckMessage]:
    if not columns:
        return []
    names = ", ".join(f"{column} ({column.found})" for column in columns)
    return [
        Error(
            f"DATABASES[{connection.alias!r}] compares ids by another collation than "
            f"the app's fields ask for: {names}. Ids that differ in case or accents "
            "may be taken for one, and one person's session for another's.",
            hint=" ".join(dict.fromkeys(map(cure, columns))),
            id="agent_sessions.E022",
        )
    ]


def _modify(connection: BaseDatabaseWrapper, column: Column) -> str:
    field = column.field
    collation = field.db_parameters(connection).get("collation")
    return (
        f"ALTER TABLE {column.table} MODIFY {field.column} {field.db_type(connection)}"
        f"{f' COLLATE {collation}' if collation else ''} NOT NULL;"
    )


def _known(
    rows: Iterable[Sequence[Any]], wanted: Callable[[Field[Any, Any]], bool]
) -> list[Column]:
    """Find the app's own columns among those that a database tells of."""
    fields = {
        (model._meta.db_table, field.column): field
        for model in apps.get_app_config("agent_sessions").get_models()
        for field in model._meta.local_fields
        if wanted(field)
    }
    found = {
        Column(table, fields[table, column], str(what))
        for table, column, what in rows
        if (table, column) in fields
    }
    return sorted(found, key=str)


def _is_exact(field: Field[Any, Any]) -> bool:
    return isinstance(field, ExactCharField)


def _is_words(field: Field[Any, Any]) -> bool:
    return isinstance(field, WideCharField | WideTextField) and not _is_exact(field)


def _rows(connection: BaseDatabaseWrapper, sql: str) -> list[Sequence[Any]]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())
