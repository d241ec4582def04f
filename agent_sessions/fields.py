"""Model fields whose comparison is the same on every database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import models

if TYPE_CHECKING:
    _CharField = models.CharField[str, str]
else:
    # Generic for type checkers alone.
    _CharField = models.CharField


class ExactCharField(_CharField):
    """A CharField that tells "a" from "A", "é" and "a ", on MariaDB and MySQL too."""

    def db_type(self, connection: Any) -> str | None:
        db_type = super().db_type(connection)
        if connection.vendor == "mysql" and db_type:
            return f"{db_type} CHARACTER SET utf8mb4"
        return db_type

    def db_parameters(self, connection: Any) -> Any:
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            # The collations that neither fold case nor pad with spaces.
            parameters["collation"] = (
                "utf8mb4_nopad_bin"
                if connection.mysql_is_mariadb
                else "utf8mb4_0900_bin"
            )
        return parameters
