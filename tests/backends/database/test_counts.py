"""How many items a session's row tells of, where the items lie elsewhere."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.test import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.models import AgentSession
from tests.servers import Server
from tests.servers.redis import url

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]

BACKENDS = "agent_sessions.backends."


@pytest.fixture(params=["redis", "encrypted", "sdk"])
def setting(request: Any, redis_server: Server, tmp_path: Path) -> dict[str, Any]:
    redis = {
        "BACKEND": f"{BACKENDS}redis.RedisBackend",
        "OPTIONS": {"url": url(redis_server, 5), "key_prefix": tmp_path.name},
    }
    sdk = {
        "BACKEND": f"{BACKENDS}sdk.SDKBackend",
        "OPTIONS": {
            "session": "agents.SQLiteSession",
            "db_path": str(tmp_path / "sdk.sqlite3"),
        },
    }
    encrypted = {
        "BACKEND": f"{BACKENDS}encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "redis", "keys": [Fernet.generate_key().decode()]},
    }
    tried = {"redis": redis, "encrypted": encrypted, "sdk": sdk}[request.param]
    return {"default": redis, "redis": redis, "tried": tried}


READERS = ("page", "apage")


def run(
    setting: dict[str, Any],
    how: str,
    environment: dict[str, str],
    session_ids: Sequence[str] = ("s",),
) -> int:
    return subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.support.five_appends"),
            *(json.dumps(setting), how, *session_ids),
        ],
        env=environment,
        timeout=60,
        check=False,
    ).returncode


def count(session_id: str = "s") -> int:
    row = AgentSession.objects.get(session_id=session_id)
    assert row.updated_at is not None
    found: int = row.item_count
    return found


@pytest.mark.parametrize(
    ("how", "expected"), [("sync", 5), ("async", 5), ("forked", 6), ("killed", 5)]
)
def test_a_process_that_ends_tells_its_last_count(
    setting: dict[str, Any],
    how: str,
    expected: int,
    database_environment: dict[str, str],
) -> None:
    code = -9 if how == "killed" else 0
    assert run(setting, how, database_environment) == code
    assert count() == expected


def test_a_page_puts_right_what_a_killed_process_left(
    setting: dict[str, Any], database_environment: dict[str, str]
) -> None:
    assert run(setting, "killed", database_environment, READERS) == -9
    # As if it had been killed between the store and the row.
    AgentSession.objects.update(item_count=1)
    with override_settings(AGENT_SESSIONS=setting):
        for reader in READERS:
            before = AgentSession.objects.get(session_id=reader)
            assert before.item_count == 1
            session = get_session(reader, backend="tried")
            read = getattr(session.backend, reader)
            if reader.startswith("a"):
                asyncio.run(read(session.key, limit=2))
            else:
                read(session.key, limit=2)
            assert count(reader) == 5
            # To look is no activity.
            after = AgentSession.objects.get(session_id=reader)
            assert after.updated_at == before.updated_at


def test_a_row_that_was_written_meanwhile_is_left_alone(
    setting: dict[str, Any],
) -> None:
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s", backend="tried")
        for _ in range(5):
            session.sync.add_items([{"role": "user", "content": "hello"}])
        sessions.reset()
        directory = session.backend.directory
        seen = directory.look(session.key)
        assert seen is not None
        assert count() == 5
        directory.touch(session.key, count=7, title="")
        directory.recount(session.key, seen, 6)
    assert count() == 7
