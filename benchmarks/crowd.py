"""A database with very many sessions, made by bulk SQL: what the lists are for.

Of 2,000 users the first owns 2,000 sessions, one of them with 100,000 items and 20,000
runs; 100,000 sessions have ten items each, and three runs. `--scale` makes all of it
smaller.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass

from django.db import connection

# Items and runs of a short session.
ITEMS = 10
RUNS = 3
# Users whose sessions are found by the first key.
HEAVY, LONG = 1, 1
DAYS = 365
_NUMBERS = ("requests", "input_tokens", "output_tokens", "cached_tokens")


@dataclass(frozen=True)
class Crowd:
    """How many there are of what."""

    sessions: int
    users: int
    heavy: int
    items: int
    runs: int

    @classmethod
    def scaled(cls, scale: float) -> Crowd:
        """Return the sizes, times `scale`."""
        full = (100_000, 2_000, 2_000, 100_000, 20_000)
        return cls(*(max(int(number * scale), 20) for number in full))

    def __str__(self) -> str:
        short = self.sessions - 1
        return (
            f"{self.sessions:,} sessions of {self.users:,} users ({self.heavy:,} of "
            f"one), {short * ITEMS + self.items:,} items (one session of "
            f"{self.items:,}), {short * RUNS + self.runs:,} runs ({self.runs:,} in "
            "that session)"
        )


def fill(crowd: Crowd) -> None:
    """Make users, sessions, items and runs in empty tables."""
    _insert(
        "auth_user",
        crowd.users,
        id="i",
        password="''",  # noqa: S106 - nobody logs in with it
        is_superuser="1 = 0",
        username=_text("user", "i"),
        first_name="''",
        last_name="''",
        email="''",
        is_staff="1 = 0",
        is_active="1 = 1",
        date_joined=_ago("0"),
    )
    _fill_sessions(crowd)
    _fill_items(crowd)
    _fill_runs(crowd)


def _fill_sessions(crowd: Crowd) -> None:
    spread = DAYS * 86_400
    text = ("remote_id", "run_owner", "agent_name", "run_id", "run_stop")
    # Every two hundredth waits for an approval, as its last run does.
    _insert(
        "agent_sessions_agentsession",
        crowd.sessions,
        id="i",
        backend="'default'",
        session_id=_text("session-", "i"),
        user_id=f"CASE WHEN i <= {crowd.heavy} THEN {HEAVY} ELSE 1 + i % {crowd.users} END",
        title=_text("What is the state of order ", "i"),
        metadata="'{}'",
        item_count=f"CASE WHEN i = {LONG} THEN {crowd.items} ELSE {ITEMS} END",
        **dict.fromkeys(text, "''"),
        **dict.fromkeys((*_NUMBERS, "reasoning_tokens", "fence"), "i % 1000"),
        remote_deleting="1 = 0",
        state="CASE WHEN i % 200 = 7 THEN 'waiting' ELSE 'idle' END",
        created_at=_ago(f"i * 7919 % {spread}"),
        updated_at=_ago(f"i * 7919 % {spread}"),
        active_on=f"CAST({_ago(f'i * 7919 % {spread}')} AS date)"
        if connection.vendor != "sqlite"
        else f"date({_ago(f'i * 7919 % {spread}')})",
    )
    _insert(
        "agent_sessions_branch",
        crowd.sessions,
        id="i",
        session_id="i",
        name="'main'",
        version="0",
        is_quarantine="1 = 0",
        head=f"CASE WHEN i = {LONG} THEN {crowd.items} ELSE {ITEMS} END",
        turn=f"CASE WHEN i = {LONG} THEN {crowd.items} ELSE {ITEMS} END / 2",
        created_at=_ago("0"),
    )
    with connection.cursor() as cursor:
        cursor.execute("UPDATE agent_sessions_agentsession SET branch_id = id")


def _fill_items(crowd: Crowd) -> None:
    data = json.dumps({"role": "user", "content": "Where is my order? " * 20})
    columns = {
        "data": f"'{data}'",
        "type": "'message'",
        "role": "'user'",
        "call_id": "''",
        "tool_name": "''",
        "text": "'Where is my order?'",
        "size": str(len(data)),
        "created_at": _ago("0"),
    }
    places: dict[str, tuple[int, str, str]] = {
        "the long session's": (crowd.items, str(LONG), "i"),
        # From the second session on, ten of each.
        "the others'": (
            (crowd.sessions - 1) * ITEMS,
            f"2 + {_div('(i - 1)', ITEMS)}",
            f"1 + (i - 1) % {ITEMS}",
        ),
    }
    for count, branch, position in places.values():
        turn = f"1 + {_div(f'({position} - 1)', 2)}"
        _insert(
            "agent_sessions_sessionitem",
            count,
            branch_id=branch,
            position=position,
            turn=turn,
            **columns,
        )


def _fill_runs(crowd: Crowd) -> None:
    each = max(crowd.items // crowd.runs, 1)
    short = (crowd.sessions - 1) * RUNS
    spread = DAYS * 86_400
    columns = {
        "agent_name": "CASE i % 4 WHEN 0 THEN 'Triage' WHEN 1 THEN 'Billing' "
        "WHEN 2 THEN 'Shipping' ELSE 'Research' END",
        "model": "'gpt-5'",
        "turn": "1",
        **dict.fromkeys((*_NUMBERS, "reasoning_tokens", "total_tokens"), "i % 5000"),
        "usage": "'{}'",
        "message_ids": "'[]'",
        "error_code": "CASE WHEN i % 50 = 0 THEN 'model_error' ELSE '' END",
        "trace_id": _text("trace_", "i"),
        "state": "''",
        "sdk_version": "'0.24.0'",
    }
    # Keys ascend with time, as runs' do: each session's in turn.
    session = f"2 + (i - 1) % {crowd.sessions - 1}"
    _insert(
        "agent_sessions_agentrun",
        short,
        id="i",
        session_id=session,
        branch_id=session,
        run_id=_text("run-", "i"),
        status=f"CASE WHEN i > {short - crowd.sessions + 1} AND ({session}) % 200 = 7 "
        "THEN 'waiting' WHEN i % 50 = 0 THEN 'failed' ELSE 'completed' END",
        started_at=_ago(f"({short} - i) * {spread / short}"),
        finished_at=_ago(f"({short} - i) * {spread / short} - 9"),
        first_position=f"1 + {_div('(i - 1)', crowd.sessions - 1)} * 3",
        last_position=f"3 + {_div('(i - 1)', crowd.sessions - 1)} * 3",
        **columns,
    )
    _insert(
        "agent_sessions_agentrun",
        crowd.runs,
        id=f"{short} + i",
        session_id=str(LONG),
        branch_id=str(LONG),
        run_id=_text("long-", "i"),
        status="CASE WHEN i % 50 = 0 THEN 'failed' ELSE 'completed' END",
        started_at=_ago(f"({crowd.runs} - i) * 9"),
        finished_at=_ago(f"({crowd.runs} - i) * 9 - 8"),
        first_position=f"1 + (i - 1) * {each}",
        last_position=f"i * {each}",
        **columns,
    )


def settle() -> None:
    """Bring keys, statistics and files to where years of use would have them."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # Keys were given by hand.
            tables = ("agentsession", "branch", "agentrun")
            for table in ("auth_user", *(f"agent_sessions_{name}" for name in tables)):
                cursor.execute(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), "  # noqa: S608
                    f"(SELECT max(id) FROM {table}))"
                )
            cursor.execute("VACUUM ANALYZE")
            cursor.execute("CHECKPOINT")
        elif connection.vendor == "sqlite":
            # No ANALYZE: projects on SQLite have no statistics either.
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()


def _insert(table: str, count: int, **columns: str) -> None:
    """Insert rows 1 to `count`; a column is SQL in which `i` is the row's number."""
    numbers = {
        "postgresql": f"generate_series(1, {count}) AS n(i)",
        "mysql": f"(SELECT CAST(seq AS SIGNED) AS i FROM seq_1_to_{count}) AS n",  # noqa: S608
        "sqlite": f"""(WITH RECURSIVE n(i) AS (
            SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}
        ) SELECT i FROM n) AS n""",  # noqa: S608
    }[connection.vendor]
    names = ", ".join(map(connection.ops.quote_name, columns))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} ({names}) "  # noqa: S608
            f"SELECT {', '.join(columns.values())} FROM {numbers}"
        )


def _text(start: str, number: str) -> str:
    """Return SQL for a text that ends in a number."""
    if connection.vendor == "mysql":
        return f"CONCAT('{start}', {number})"
    return f"'{start}' || {number}"


def _div(number: str, by: int) -> str:
    """Return SQL for a whole division."""
    return f"{number} {'DIV' if connection.vendor == 'mysql' else '/'} {by}"


def _ago(seconds: str) -> str:
    """Return SQL for a moment so many seconds ago."""
    return {
        "postgresql": f"now() - make_interval(secs => {seconds})",
        "mysql": f"UTC_TIMESTAMP(6) - INTERVAL ({seconds}) SECOND",
        "sqlite": f"datetime('now', '-' || ({seconds}) || ' seconds')",
    }[connection.vendor]


def parsed(
    description: str | None, program: str, *more: str
) -> argparse.ArgumentParser:
    """Begin the command line of a benchmark on such data."""
    parser = argparse.ArgumentParser(description=description, prog=program)
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite", *more), default="postgresql"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of 100,000 sessions (default: 1)"
    )
    return parser
