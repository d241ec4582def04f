"""The contract suite on the SDK's own stores, to show that it is fair."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents.memory import Session, SQLiteSession

from agent_sessions.testing import SessionContract
from tests.support.contract import ProcessCases

IDS = "ids are taken as they are, without a limit that all databases can keep"
NOT_JSON = "whatever json.dumps writes is stored, so also NaN, Infinity and scalars"
SCALARS = "any JSON value is taken for an item"
DRAINS = "pop deletes the rows that it can't read"


class TestSQLiteSession(ProcessCases, SessionContract):
    supports_corrupt = True
    supports_second_process = True

    known_gaps = {
        "test_settings_assigned_as_a_dict_are_coerced": "settings are a plain attribute",
        "test_negative_limit_gives_nothing": "SQLite takes LIMIT -1 for everything",
        "test_id_is_refused[empty]": IDS,
        "test_id_is_refused[256_characters]": IDS,
        "test_id_is_refused[nul]": IDS,
        **{
            f"test_is_refused[{name}]": NOT_JSON
            for name in (
                *("nan", "infinity", "minus_infinity"),
                *("scalar", "none", "string", "list"),
            )
        },
        "test_nesting_without_end_is_refused": "json's RecursionError comes through",
        "test_refused_at_the_end_of_a_big_batch": NOT_JSON,
        "test_run_whose_question_is_refused[run]": NOT_JSON,
        "test_run_whose_question_is_refused[run_streamed]": NOT_JSON,
        **{
            f"{case}[{name}]": SCALARS
            for case in (
                "test_unreadable_row_is_passed_over",
                "test_limit_counts_readable_items",
            )
            for name in ("null", "number", "string", "list")
        },
        **{
            f"test_pop_passes_over_an_unreadable_tail[{name}]": DRAINS
            for name in ("cut_off", "not_json", "empty")
        },
        **{
            f"test_pop_passes_over_an_unreadable_tail[{name}]": SCALARS
            for name in ("null", "number", "string", "list")
        },
        "test_pop_where_nothing_is_readable": DRAINS,
    }

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path / "sessions.sqlite3"
        self.opened: list[SQLiteSession] = []
        yield
        for session in self.opened:
            session.close()

    async def make_session(self, session_id: str, **options: Any) -> Session:
        # Its constructor reads and writes the file.
        session = await asyncio.to_thread(
            SQLiteSession, session_id, self.path, **options
        )
        self.opened.append(session)
        return session

    async def corrupt(self, session: Session, nth: int, data: str) -> str:
        return await asyncio.to_thread(self._corrupt, session.session_id, nth, data)

    def _corrupt(self, session_id: str, nth: int, data: str) -> str:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            rows = connection.execute(
                "SELECT id, message_data FROM agent_messages "
                "WHERE session_id = ? ORDER BY id",
                [session_id],
            ).fetchall()
            row_id, original = rows[nth]
            connection.execute(
                "UPDATE agent_messages SET message_data = ? WHERE id = ?",
                [data, row_id],
            )
        return str(original)

    def process_source(self) -> str:
        return f"""
from agents.memory import SQLiteSession

async def make_session(session_id):
    return SQLiteSession(session_id, {str(self.path)!r})
"""


def test_kit_needs_no_django_settings() -> None:
    """The authors of other stores may have no Django project."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DJANGO")}
    subprocess.run(
        [sys.executable, "-c", "import agent_sessions.testing"],
        cwd=Path(__file__).parents[2],
        env=environment,
        check=True,
    )


class MemoryStore(SessionContract):
    """The SDK's store in memory, which another object can't open."""

    supports_reopen = False

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return SQLiteSession(session_id, **options)


def test_cases_of_what_is_not_supported_are_left_out() -> None:
    assert callable(MemoryStore.test_item_comes_back)
    assert vars(MemoryStore)["test_session_is_closed_to_others"] is None
    assert vars(MemoryStore)["test_foreign_writes_are_seen_at_once"] is None


def test_what_a_subclass_supports_comes_back() -> None:
    class WithAlias(MemoryStore):
        supports_clear_alias = True

    assert vars(MemoryStore)["test_clear_is_an_alias"] is None
    assert callable(WithAlias.test_clear_is_an_alias)
