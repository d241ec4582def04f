"""The contract suite on encrypted sessions, over Django's databases and other stores."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents.memory import Session, SQLiteSession
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.test import override_settings

from agent_sessions import EncryptedSession, get_session
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.models import SessionItem
from agent_sessions.testing import SessionContract
from tests.support.contract import StoreContract
from tests.support.list_backend import ListBackend

KEY = "tWbR7cyRZ9TxOiGGW8Dl2gG5XHJ1vVFqUPWmNOYlqEc="
DATABASE = "agent_sessions.backends.database.DatabaseBackend"
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"


def encrypted(inner: Any, **options: Any) -> dict[str, Any]:
    """Return settings whose alias "private" encrypts what `inner` stores."""
    return {
        "default": inner,
        "private": {
            "BACKEND": ENCRYPTED,
            "OPTIONS": {"backend": "default", "keys": [KEY], **options},
        },
    }


@pytest.mark.django_db
class EncryptedContract(StoreContract):
    __test__ = False
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    # The test holds a transaction that other threads can't see.
    supports_threads = False
    foreign_error = SessionDoesNotExist
    examples = 10

    setting: Any = encrypted({"BACKEND": DATABASE})

    @pytest.fixture(autouse=True)
    def _configured(self) -> Iterator[None]:
        with override_settings(AGENT_SESSIONS=self.setting):
            yield

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, backend="private", **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        return await sync_to_async(create)(f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        def corrupt() -> str:
            rows = SessionItem.objects.filter(
                branch__session__session_id=session.session_id
            )
            item = list(rows.order_by("position"))[nth]
            original, item.data = item.data, data
            item.save(update_fields=["data"])
            return str(original)

        return await sync_to_async(corrupt)()


# What it stores is text like any other, which the database's own contract tries.
@pytest.mark.one_database
class TestOverADatabase(EncryptedContract):
    __test__ = True


@pytest.mark.one_database
@pytest.mark.another_store
class TestWithSessionKeys(EncryptedContract):
    __test__ = True
    setting = encrypted({"BACKEND": DATABASE}, session_keys=True)


@pytest.mark.one_database
@pytest.mark.another_store
class TestOverAnotherStore(EncryptedContract):
    __test__ = True
    setting = encrypted({"BACKEND": ListBackend})

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        texts = ListBackend.histories[session.key.user_id, session.session_id]
        original, texts[nth] = texts[nth], data
        return original


@pytest.mark.another_store
class TestAroundAnSDKSession(SessionContract):
    """EncryptedSession around the SDK's own SQLiteSession."""

    supports_wrapper = True
    supports_clear_alias = True
    examples = 10

    known_gaps = {
        f"test_id_is_refused[{case}]": "the SDK's session takes ids as they are"
        for case in ("empty", "256_characters", "nul")
    }

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path / "sessions.sqlite3"
        self.opened: list[SQLiteSession] = []
        yield
        for session in self.opened:
            session.close()

    async def make_session(self, session_id: str, **options: Any) -> Session:
        settings = options.pop("session_settings", None)
        # Its constructor reads and writes the file.
        inner = await asyncio.to_thread(SQLiteSession, session_id, self.path)
        self.opened.append(inner)
        session = EncryptedSession(inner, KEY)
        if settings is not None:
            session.session_settings = settings
        return session
