"""How many items a session's row tells of, where the items lie elsewhere."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.test import override_settings

from agent_sessions import get_session
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


def run(setting: dict[str, Any], how: str, environment: dict[str, str]) -> int:
    return subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.support.five_appends"),
            *(json.dumps(setting), how),
        ],
        env=environment,
        timeout=60,
        check=False,
    ).returncode


def count() -> int:
    row = AgentSession.objects.get(session_id="s")
    assert row.updated_at is not None
    found: int = row.item_count
    return found


@pytest.mark.parametrize(
    ("how", "expected"), [("sync", 5), ("async", 5), ("forked", 6)]
)
def test_a_process_that_ends_tells_its_last_count(
    setting: dict[str, Any],
    how: str,
    expected: int,
    database_environment: dict[str, str],
) -> None:
    assert run(setting, how, database_environment) == 0
    assert count() == expected


@pytest.mark.parametrize("reader", ["latest", "alatest", "page", "apage"])
def test_whoever_reads_next_puts_right_what_a_killed_process_left(
    setting: dict[str, Any], reader: str, database_environment: dict[str, str]
) -> None:
    assert run(setting, "killed", database_environment) == -9
    before = AgentSession.objects.get(session_id="s")
    assert before.item_count == 1
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s", backend="tried")
        read = getattr(session.backend, reader)
        arguments = {"limit": 2}
        if reader.startswith("a"):
            asyncio.run(read(session.key, **arguments))
        else:
            read(session.key, **arguments)
        after = AgentSession.objects.get(session_id="s")
        assert after.item_count == 5
        # To look is no activity.
        assert after.updated_at == before.updated_at


def test_a_row_that_was_written_meanwhile_is_left_alone(
    setting: dict[str, Any], database_environment: dict[str, str]
) -> None:
    assert run(setting, "sync", database_environment) == 0
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s", backend="tried")
        directory = session.backend.directory
        seen = directory.look(session.key)
        assert seen is not None
        directory.touch(session.key, count=7, title="")
        directory.recount(session.key, seen, 6)
    assert count() == 7
