"""What queries read, as the database itself counts it: exact on a busy machine too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from django.db import connection

# Instructions of SQLite between two calls back.
_STEP = 100


@dataclass(slots=True)
class Costs:
    """Queries of a page: how many, and what those that only read have read.

    `rows` are all that scans looked at, kept or not; `buffers` are pages of 8 KB. SQLite
    counts neither: there, `rows` are instructions of its machine, in hundreds.
    """

    queries: int = 0
    rows: int = 0
    buffers: int = 0
    # The dearest query, with its rows.
    worst: tuple[int, str] = (0, "")
    _asked: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, execute: Any, sql: str, params: Any, *rest: Any) -> Any:
        self.queries += 1
        if sql.lstrip("( ").startswith(("SELECT", "WITH")):
            self._asked.append((sql, params))
        return execute(sql, params, *rest)

    def count(self) -> None:
        """Ask the database what the queries read."""
        for sql, params in self._asked:
            rows, buffers = _ASK[connection.vendor](sql, params)
            self.rows += rows
            self.buffers += buffers
            self.worst = max(self.worst, (rows, sql))
        self._asked.clear()


@contextmanager
def watched() -> Iterator[Costs]:
    """Count the queries of a block, and what they read."""
    costs = Costs()
    with connection.execute_wrapper(costs):
        yield costs
    costs.count()


def _of_postgresql(sql: str, params: Any) -> tuple[int, int]:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", params)
        found = cursor.fetchone()[0]
    (plan,) = found if isinstance(found, list) else json.loads(found)
    top = plan["Plan"]
    return _scanned(top), top["Shared Hit Blocks"] + top["Shared Read Blocks"]


def _scanned(node: dict[str, Any]) -> int:
    """Return the rows that the scans below a node of a plan looked at."""
    rows = sum(map(_scanned, node.get("Plans", ())))
    if "Relation Name" in node or ("Index Name" in node and not node.get("Plans")):
        removed = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
        own = node["Actual Rows"] + sum(node.get(name, 0) for name in removed)
        rows += round(own * node["Actual Loops"])
    return rows


def _of_mariadb(sql: str, params: Any) -> tuple[int, int]:
    with connection.cursor() as cursor:
        before = _handled(cursor)
        cursor.execute(sql, params)
        cursor.fetchall()
        return _handled(cursor) - before, 0


def _handled(cursor: Any) -> int:
    cursor.execute("SHOW SESSION STATUS LIKE 'Handler_read%'")
    return sum(int(number) for _name, number in cursor.fetchall())


def _of_sqlite(sql: str, params: Any) -> tuple[int, int]:
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    with connection.cursor() as cursor:
        connection.connection.set_progress_handler(step, _STEP)
        try:
            cursor.execute(sql, params)
            cursor.fetchall()
        finally:
            connection.connection.set_progress_handler(None, 0)
    return steps, 0


_ASK = {"postgresql": _of_postgresql, "mysql": _of_mariadb, "sqlite": _of_sqlite}
