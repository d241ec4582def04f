"""Writers of encrypted sessions that are killed: what was acknowledged is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
from django.test import override_settings

from agent_sessions import get_session
from agent_sessions.models import AgentSession, SessionItem
from tests.backends.encrypted.test_encrypted_contract import DATABASE, encrypted
from tests.support.killed_writer import KILLS, append, batch

pytestmark = pytest.mark.one_database


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
def test_what_was_acknowledged_opens_and_nothing_else_is_there(
    database_environment: dict[str, str], options: Any
) -> None:
    setting = encrypted({"BACKEND": DATABASE}, **options)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_writer", json.dumps(setting)],
        env=database_environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    acknowledged: dict[str, list[int]] = defaultdict(list)
    ends: dict[str, list[bool]] = defaultdict(list)
    for line in done.stdout.splitlines():
        session_id, numbers, killed = json.loads(line)
        acknowledged[session_id] += numbers
        ends[session_id].append(killed)
    with override_settings(AGENT_SESSIONS=setting):
        # Not at first, then before each statement of a write once, at last not again.
        statements = len(ends["old"]) - 2
        assert statements > 3
        assert ends["old"] == [False, *[True] * statements, False]
        assert acknowledged["old"] == [0, statements + 1]
        for session_id, numbers in acknowledged.items():
            if session_id.startswith("busy"):
                look_at_busy(session_id, numbers)
            else:
                look_at(session_id, numbers)
        busy = [ends[f"busy-{number}"] for number in range(KILLS)]
        assert busy == [[True]] * KILLS
        assert all(acknowledged[f"busy-{number}"] for number in range(KILLS))
        assert not SessionItem.objects.filter(data__contains="treasure").exists()


def look_at(session_id: str, numbers: list[int]) -> None:
    """See that exactly these batches are there, and that more can be written."""
    expected = [item for number in numbers for item in batch(session_id, number)]
    session = get_session(session_id, backend="private").sync
    assert session.get_items() == expected
    assert rows(session_id) == len(expected)
    append(session_id, 1_000)
    assert session.get_items() == expected + batch(session_id, 1_000)
    row = AgentSession.objects.get(session_id=session_id)
    assert row.item_count == rows(session_id) == len(expected) + 3


def look_at_busy(session_id: str, numbers: list[int]) -> None:
    """See that all acknowledged batches are there, and at most one more, whole.

    That one was stored, and the process killed before it could tell.
    """
    assert numbers == list(range(len(numbers)))
    there, rest = divmod(rows(session_id), 3)
    assert there in (len(numbers), len(numbers) + 1)
    assert rest == 0
    look_at(session_id, list(range(there)))


def rows(session_id: str) -> int:
    """Count what is stored, whether it opens or not."""
    own = SessionItem.objects.filter(branch__session__session_id=session_id)
    return own.count()
