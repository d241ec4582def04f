"""The statements of the hot path, in each database's own words."""

from __future__ import annotations

from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.database.sql.base import Statements
from agent_sessions.backends.database.sql.mysql import MySQLStatements
from agent_sessions.backends.database.sql.postgresql import PostgreSQLStatements
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
