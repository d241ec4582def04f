"""Stores of other packages, written by their own classes, to import from."""

from __future__ import annotations

import asyncio
import io
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import SQLiteSession
from django.core.management import CommandError, call_command
from django.db import connections

from agent_sessions import DjangoSession

Item = dict[str, Any]


def run_import(kind: str, place: Any, *args: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command(
        "import_agent_sessions",
        kind,
        "--from",
        str(place),
        *args,
        stdout=out,
        stderr=err,
    )
    return out.getvalue(), err.getvalue()


def conversation(turns: int, *, about: str = "x") -> list[Item]:
    """Return turns of a question, a call, its output and an answer."""
    return [
        item
        for n in range(turns)
        for item in (
            {"role": "user", "content": f"{about} {n} é 😀 \x00 \ud800"},
            {
                "type": "function_call",
                "call_id": f"c{n}",
                "name": "look",
                "arguments": '{"n": 1e22}',
            },
            {"type": "function_call_output", "call_id": f"c{n}", "output": str(n)},
            {
                "type": "message",
                "role": "assistant",
                "id": f"m{n}",
                "content": [{"type": "output_text", "text": f"answer {n}"}],
            },
        )
    ]


def write_sqlite(
    path: Path, session_id: str, items: Sequence[Item], **options: Any
) -> None:
    session = SQLiteSession(session_id, path, **options)
    asyncio.run(session.add_items(list(items)))  # type: ignore[arg-type]
    session.close()


def read_sqlite(path: Path, session_id: str) -> list[Any]:
    session = SQLiteSession(session_id, path)
    try:
        return asyncio.run(session.get_items())
    finally:
        session.close()


def imported(session_id: str, **options: Any) -> list[Any]:
    return DjangoSession(session_id, **options).sync.get_items()


def execute(*statements: str, database: str = "default") -> None:
    with connections[database].cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def refused(kind: str, path: Any, *args: str) -> str:
    """Import, and give what was refused and why."""
    reasons = io.StringIO()
    with pytest.raises(CommandError, match="not imported"):
        call_command(
            "import_agent_sessions", kind, "--from", str(path), *args,
            stdout=io.StringIO(), stderr=reasons,
        )  # fmt: skip
    return reasons.getvalue()


def change(path: Path, sql: str, *params: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, params)


def said(*texts: str) -> list[Any]:
    return [{"role": "user", "content": text} for text in texts]
