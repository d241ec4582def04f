"""The contract suite on SDKBackend, over each of the SDK's classes that can run here.

What the classes can't keep is told by their known gaps. tests/memory/test_contract_sdk.py has
those of SQLiteSession as it is: the backend mends most of them.
"""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from agents.memory import Session
from django.contrib.auth import get_user_model
from django.test import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.sdk import SDKBackend
from agent_sessions.backends.sdk.backend import inner_id
from agent_sessions.exceptions import SessionDoesNotExist
from tests.support.contract import OnThePool, StoreContract

T = TypeVar("T")

SCALARS = "any JSON value is taken for an item, and popped"
DRAINS = "pop deletes the rows that it can't read"

COLUMNS = "its columns of type and role take no lone surrogates"

POP_GAPS = {
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


@pytest.mark.one_database
class SDKContract(OnThePool, StoreContract):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    foreign_error = SessionDoesNotExist
    examples = 5

    target: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("sdk") / "sessions.sqlite3"

    @pytest.fixture(autouse=True)
    def _alias(self, path: Path) -> Iterator[None]:
        self.file = path
        self.setting = {
            "default": {
                "BACKEND": f"{SDKBackend.__module__}.SDKBackend",
                "OPTIONS": {
                    "session": self.target,
                    **self.arguments(),
                },
            }
        }
        with override_settings(AGENT_SESSIONS=self.setting):
            yield

    def arguments(self) -> Mapping[str, Any]:
        return {"db_path": str(self.file)}

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        threads = sessions["default"].threads
        return await threads.run(create, f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        return await asyncio.to_thread(self._corrupt, inner_id(session.key), nth, data)

    def _corrupt(self, session_id: str, nth: int, data: str) -> str:
        with closing(sqlite3.connect(self.file)) as connection, connection:
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
import django
django.setup()
from django.test import override_settings
from agent_sessions import get_session

override_settings(AGENT_SESSIONS={self.setting!r}).enable()

async def make_session(session_id):
    return get_session(session_id)
"""


@pytest.mark.another_store
class TestSQLite(SDKContract):
    supports_second_process = True
    target = "agents.memory.SQLiteSession"
    known_gaps = POP_GAPS


@pytest.mark.another_store
class TestAsyncSQLite(SDKContract):
    target = "agents.extensions.memory.AsyncSQLiteSession"
    known_gaps = POP_GAPS


@pytest.mark.another_store
class TestAdvancedSQLite(SDKContract):
    target = "agents.extensions.memory.AdvancedSQLiteSession"
    known_gaps = {
        **POP_GAPS,
        "test_item_comes_back[columns_no_database_takes]": COLUMNS,
    }
    # They make items whose type is no text, which the class refuses.
    test_generated_items_come_back = None  # type: ignore[assignment]
    test_generated_operations_match_a_list = None  # type: ignore[assignment]

    def arguments(self) -> Mapping[str, Any]:
        return {"db_path": str(self.file), "create_tables": True}


@pytest.mark.another_store
class TestSQLAlchemy(SDKContract):
    target = "agents.extensions.memory.SQLAlchemySession.from_url"
    known_gaps = POP_GAPS

    def arguments(self) -> Mapping[str, Any]:
        return {"url": f"sqlite+aiosqlite:///{self.file}", "create_tables": True}
