"""Which database gets which statements."""

from __future__ import annotations

from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.database.mysql import MySQLStatements
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.statements import Statements
from agent_sessions.exceptions import InvalidBackend

_VENDORS: dict[str, type[Statements]] = {
    "sqlite": Statements,
    "postgresql": PostgreSQLStatements,
    "mysql": MySQLStatements,
}


def statements_for(connection: BaseDatabaseWrapper, alias: str) -> Statements:
    """Choose the statements of a connection's database. Raises InvalidBackend."""
    found = _VENDORS.get(connection.vendor)
    if found is None:
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: {connection.display_name} is not supported; "
            "use PostgreSQL, SQLite, MariaDB or MySQL."
        )
    return found(connection, alias)
