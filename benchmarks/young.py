"""How long a turn takes whose plans were made while the tables filled a page or two.

PostgreSQL keeps plans, and prefers to read small tables whole. Turns are made until its
plans are kept, then the tables grow without an ANALYZE, and the same turns are timed
before and after one. It judges nothing unless --max-ratio is given.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from statistics import median
from typing import Any

from django.db import connection

from benchmarks.database import database
from benchmarks.items import history, turn
from benchmarks.plans import LIMIT

_TABLES = ("agentsession", "branch", "sessionitem")
# In a turn's first calls a loop has no connections of its own yet.
_WARM = 40
_TURNS = 200
_SMALL = 20


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.young")
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20, help="of each session")
    parser.add_argument(
        "--max-ratio",
        type=float,
        metavar="TIMES",
        help="exit with 1 where a turn takes more than this many times its normal time",
    )
    return parser.parse_args(argv)


def _execute(statement: str, *params: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)


def _analyse() -> None:
    for table in _TABLES:
        _execute(f"ANALYZE agent_sessions_{table}")


def _grow(sessions: int, items: int) -> None:
    """Copy the first session's rows, so that all their columns are as they should be."""
    for table, columns in (
        ("agentsession", "'id', 1000000 + n, 'session_id', 'grown-' || n"),
        ("branch", "'id', 1000000 + n, 'session_id', 1000000 + n, 'head', %s"),
    ):
        name = f"agent_sessions_{table}"
        _execute(
            f"INSERT INTO {name} SELECT (jsonb_populate_record(r, "  # noqa: S608
            f"jsonb_build_object({columns}))).* FROM generate_series(1, %s) n, "
            f"{name} r WHERE r.id = (SELECT min(id) FROM {name})",
            *([items] if table == "branch" else []),
            sessions,
        )
    _execute("UPDATE agent_sessions_agentsession SET branch_id = id WHERE id > 1000000")
    columns = "type, role, call_id, tool_name, text, size, created_at"
    _execute(
        "INSERT INTO agent_sessions_sessionitem "  # noqa: S608
        "(branch_id, position, turn, data, "
        f"{columns}) SELECT 1000000 + n, p, p, data, {columns} "
        "FROM generate_series(1, %s) n, generate_series(1, %s) p, "
        "(SELECT * FROM agent_sessions_sessionitem ORDER BY id LIMIT 1) i",
        sessions,
        items,
    )


async def _time(name: str, number: int) -> float:
    """Return the median seconds of turns in one session."""
    from agent_sessions import get_session

    session = get_session(name)
    spent = []
    for each in range(number):
        start = time.perf_counter()
        await session.get_items(limit=LIMIT)
        await session.add_items(turn(each))
        spent.append(time.perf_counter() - start)
    return median(spent)


async def _measure(options: argparse.Namespace) -> float:
    from agent_sessions import get_session

    await get_session("first").add_items(history(_SMALL))
    await asyncio.to_thread(_analyse)
    await _time("first", _WARM)
    await asyncio.to_thread(_grow, options.sessions, options.items)
    # What was just written settles meanwhile, as it has by the time of the others.
    await _time("grown-6", _WARM)
    young = await _time("grown-7", _TURNS)
    await asyncio.to_thread(_analyse)
    await _time("grown-8", _WARM)
    normal = await _time("grown-9", _TURNS)
    print(f"turn with plans of young tables: {young * 1000:.2f} ms")
    print(f"turn after ANALYZE:              {normal * 1000:.2f} ms")
    print(f"ratio:                           {young / normal:.2f}")
    return young / normal


def main(argv: list[str] | None = None) -> int:
    """Make the moment, and time it."""
    options = arguments(argv)
    with database("postgresql"):
        for table in _TABLES:
            _execute(
                f"ALTER TABLE agent_sessions_{table} SET (autovacuum_enabled = false)"
            )
        ratio = asyncio.run(_measure(options))
    return int(options.max_ratio is not None and ratio > options.max_ratio)


if __name__ == "__main__":
    sys.exit(main())
