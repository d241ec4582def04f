"""What can be wrong with a Django database that holds sessions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections
from django.db.models import Field

from agent_sessions.fields import CHARSET, ExactCharField, WideCharField, WideTextField

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

# Tables, columns, how they compare texts, where that is otherwise than by each letter,
# and which characters they hold.
_COLUMNS = {
    "sqlite": """
SELECT DISTINCT tables.name, columns.name, columns.coll, NULL
FROM sqlite_master AS tables, pragma_index_list(tables.name) AS indexes,
    pragma_index_xinfo(indexes.name) AS columns
WHERE tables.type = 'table' AND columns.name IS NOT NULL AND columns.coll <> 'BINARY'
""",
    "postgresql": """
SELECT tables.relname, columns.attname,
    CASE WHEN types.typname = 'citext' THEN 'citext' ELSE collations.collname END, NULL
FROM pg_attribute AS columns
JOIN pg_class AS tables ON tables.oid = columns.attrelid
JOIN pg_type AS types ON types.oid = columns.atttypid
LEFT JOIN pg_collation AS collations ON collations.oid = columns.attcollation
WHERE tables.relkind = 'r' AND pg_table_is_visible(tables.oid)
    AND (types.typname = 'citext' OR NOT collations.collisdeterministic)
""",
    "mysql": """
SELECT table_name, column_name, collation_name, character_set_name
FROM information_schema.columns
WHERE table_schema = DATABASE() AND collation_name IS NOT NULL
""",
}


def check_columns(using: str) -> list[CheckMessage]:
    """Report columns that take two ids for one, or can't hold every character."""
    connection = connections[using]
    if (sql := _COLUMNS.get(connection.vendor)) is None:
        return []
    with connection.cursor() as cursor:
        cursor.execute(sql)
        found = {(table, column): told for table, column, *told in cursor.fetchall()}
    folding: dict[str, str] = {}
    narrow: dict[str, str] = {}
    for model in apps.get_app_config("agent_sessions").get_models():
        for field in model._meta.local_fields:
            table, column = model._meta.db_table, field.column
            collation, charset = found.get((table, column), (None, None))
            wanted = field.db_parameters(connection).get("collation")
            if isinstance(field, ExactCharField):
                if collation not in {None, wanted}:
                    cure = _cure(connection, field)
                    folding[f"{table}.{column} ({collation})"] = cure
            elif charset not in {None, CHARSET} and isinstance(
                field, WideCharField | WideTextField
            ):
                before = narrow.get(charset, "")
                narrow[charset] = f"{before}{_cure(connection, field)} "
    messages: list[CheckMessage] = []
    if folding:
        messages.append(
            Error(
                f"DATABASES[{using!r}] compares ids by another collation than the app's "
                f"fields ask for: {', '.join(sorted(folding))}. Ids that differ in case "
                "or accents may be taken for one, and one person's session for "
                "another's.",
                hint=" ".join(dict.fromkeys(folding.values())),
                id="agent_sessions.E022",
            )
        )
    if narrow:
        messages.append(
            Warning(
                f"DATABASES[{using!r}] keeps texts as {', '.join(sorted(narrow))}, "
                "which has no emoji: titles and the texts of lists lose them.",
                # Not CONVERT TO, which would change the columns of ids too.
                hint="".join(narrow.values()).strip(),
                id="agent_sessions.W005",
            )
        )
    return messages


def _cure(connection: BaseDatabaseWrapper, field: Field[Any, Any]) -> str:
    if connection.vendor == "sqlite":
        return "Make the table anew without COLLATE at this column."
    table, kind = field.model._meta.db_table, field.db_type(connection)
    if connection.vendor == "postgresql":
        return f'ALTER TABLE {table} ALTER COLUMN {field.column} TYPE {kind} COLLATE "default";'
    collation = field.db_parameters(connection).get("collation")
    collate = f" COLLATE {collation}" if collation else ""
    return f"ALTER TABLE {table} MODIFY {field.column} {kind}{collate} NOT NULL;"
