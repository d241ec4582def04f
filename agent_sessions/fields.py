"""Model fields that behave the same on every database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import models

# What MariaDB and MySQL call UTF-8.
CHARSET = "utf8mb4"

if TYPE_CHECKING:
    _CharField = models.CharField[str, str]
    _TextField = models.TextField[str, str]
else:
    # Generic for type checkers alone.
    _CharField = models.CharField
    _TextField = models.TextField


def _of_every_character(db_type: str | None, connection: Any) -> str | None:
    """Let a column of MariaDB or MySQL take more than its database's characters."""
    if connection.vendor == "mysql" and db_type:
        return f"{db_type} CHARACTER SET {CHARSET}"
    return db_type


class WideCharField(_CharField):
    """A CharField that holds every character, whatever its database's others hold."""

    def db_type(self, connection: Any) -> str | None:
        """Return the column's type, with a character set that holds every character."""
        return _of_every_character(super().db_type(connection), connection)


class WideTextField(_TextField):
    """A TextField that holds every character, whatever its database's others hold."""

    def db_type(self, connection: Any) -> str | None:
        """Return the column's type, with a character set that holds every character."""
        return _of_every_character(super().db_type(connection), connection)


class ExactCharField(WideCharField):
    """A CharField that tells "a" from "A", "é" and "a ", on MariaDB and MySQL too.

    Its texts are in the order of their characters' numbers, so that an index serves a
    search for their beginning.
    """

    def db_parameters(self, connection: Any) -> Any:
        """Return the parameters of the column, with a collation that compares exactly."""
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            # The collations that neither fold case nor pad with spaces.
            parameters["collation"] = (
                "utf8mb4_nopad_bin"
                if connection.mysql_is_mariadb
                else "utf8mb4_0900_bin"
            )
        elif connection.vendor == "postgresql":
            parameters["collation"] = "C"
        return parameters


class RawTextField(_TextField):
    """A TextField that gives what is no UTF-8 too, as raw lone surrogates.

    SQLite keeps any bytes in a text column, and its driver then fails for all rows of
    a query, with an error that quotes them.
    """

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        """Read bytes on SQLite."""
        if compiler.connection.vendor == "sqlite":
            sql = f"CAST({sql} AS BLOB)"
        return sql, params

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        """Decode what was read as bytes."""
        if isinstance(value, bytes):
            return value.decode(errors="surrogateescape")
        return value

    def deconstruct(self) -> Any:
        """Describe the field as a plain TextField, which its column is."""
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.TextField", args, kwargs
