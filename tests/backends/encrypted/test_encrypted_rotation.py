"""manage.py rotate_agent_session_keys: everything under the first key, nothing moved."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from agents.extensions.memory import EncryptedSession as SDKEncryptedSession
from asgiref.sync import sync_to_async
from django.core.management import CommandError, call_command
from django.db import DatabaseError

from agent_sessions import get_session, sessions
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted import EncryptedBackend
from agent_sessions.backends.encrypted.rotation import Rotation
from agent_sessions.backends.wrapping import innermost
from agent_sessions.exceptions import InvalidApproval, UnknownEncryptionKey
from agent_sessions.handler import open_session
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    RunEvents,
    SessionItem,
    SessionSecret,
)
from agent_sessions.runs import Conversation, Frame, event_rows
from agent_sessions.runs.event_rows import About, Chunk, Unwritten
from tests.backends.encrypted.test_encrypted import TREASURE, data, key_id, private
from tests.backends.encrypted.test_encrypted import under as under_default
from tests.encryption.test_encryption import NEW, OLD, said
from tests.support.list_backend import ListBackend
from tests.support.waiting import asked, opened, wait

pytestmark = [pytest.mark.django_db(transaction=True)]
one_database = pytest.mark.one_database

PLACES = ("pk", "branch", "position", "turn", "created_at")


def under(*keys: str, **options: Any) -> Any:
    """Configure keys that are asked for every second, so that a rotation waits for two."""
    return under_default(*keys, **{"key_refresh": 1, **options})


def rotate(*arguments: str) -> str:
    """Call the command; give what it says, on both outputs."""
    out = StringIO()
    call_command("rotate_agent_session_keys", *arguments, stdout=out, stderr=out)
    said = out.getvalue()
    assert NEW not in said
    assert OLD not in said
    assert TREASURE not in said
    return said


def key_ids() -> set[str]:
    texts = SessionItem.objects.values_list("data", flat=True)
    return {json.loads(text).get("kid") for text in texts}


def fill(count: int = 5, session_id: str = "s", **options: Any) -> list[Any]:
    items = [said(f"{TREASURE} {number}") for number in range(count)]
    private(session_id, **options).sync.add_items(items)
    return items


def test_all_is_put_under_the_first_key_and_stays_in_its_place() -> None:
    with under(OLD):
        items = fill()
        fill(3, "other")
    places = list(SessionItem.objects.order_by("pk").values_list(*PLACES))
    before = list(SessionItem.objects.values_list("data", flat=True))
    with under(NEW, OLD):
        told = rotate("--batch-size", "2")
        assert f"private: 8 items of 2 sessions put under key {key_id(NEW)}." in told
        assert "0 items of 0 sessions" in rotate()
    assert places == list(SessionItem.objects.order_by("pk").values_list(*PLACES))
    assert key_ids() == {key_id(NEW)}
    ids = [json.loads(text)["id"] for text in before]
    after = list(SessionItem.objects.values_list("data", "size"))
    assert sorted(ids) == sorted(json.loads(text)["id"] for text, _ in after)
    assert all(len(text) == size for text, size in after)
    with under(NEW):
        assert private().sync.get_items() == items


def test_branches_that_were_archived_are_rotated_too() -> None:
    with under(OLD):
        fill(4)
        session = private()
        asyncio.run(session._atomic_replace_items([said("all")]))
    with under(NEW, OLD):
        assert "5 items" in rotate()
    assert key_ids() == {key_id(NEW)}


def test_histories_of_the_sdk_get_envelopes_of_ours() -> None:
    with under(NEW, OLD, accept_sdk_envelopes=True):
        inner: Any = open_session(innermost(sessions["private"]), SessionKey("s"))
        theirs = SDKEncryptedSession("s", inner, OLD)
        asyncio.run(theirs.add_items([said("theirs")]))
        assert "1 item of 1 session" in rotate()
        assert key_ids() == {key_id(NEW)}
    with under(NEW):
        assert private().sync.get_items() == [said("theirs")]


def test_what_does_not_open_is_counted_and_left(capsys: Any) -> None:
    with under(OLD):
        fill(2, "missing")
    with under(NEW):
        fill(3, "changed")
        envelope = json.loads(data("changed").first().data)
        envelope["payload"], envelope["kid"] = "gAAAAA", "hkdf-v1"
        data("changed").filter(position=1).update(data=json.dumps(envelope))
        data("changed").filter(position=2).update(data='{"role": "user"}')
        before = sorted(SessionItem.objects.values_list("data", flat=True))
        out = StringIO()
        with pytest.raises(CommandError, match="Keep the older keys") as caught:
            call_command("rotate_agent_session_keys", stdout=out, stderr=out)
        assert caught.value.returncode == 3
        assert f"private: 2 rows under key {key_id(OLD)}" in out.getvalue()
        assert "private: 1 row under key hkdf-v1" in out.getvalue()
        assert "private: 1 row that don't open" in out.getvalue()
        assert before == sorted(SessionItem.objects.values_list("data", flat=True))


def test_a_rotation_that_broke_off_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with under(OLD):
        fill(6)
    with under(NEW, OLD):
        backend: Any = sessions["private"]
        write = backend.inner.engine.atomically
        batches: list[int] = []

        def killed(operation: Callable[[], Any]) -> Any:
            if len(batches) == 2:
                raise DatabaseError(TREASURE)
            batches.append(1)
            return write(operation)

        monkeypatch.setattr(backend.inner.engine, "atomically", killed)
        with pytest.raises(CommandError, match="DatabaseError") as caught:
            rotate("--batch-size", "2")
        assert caught.value.returncode == 3
        assert TREASURE not in str(caught.value)
        monkeypatch.undo()
        assert key_ids() == {key_id(NEW), key_id(OLD)}
        assert len(private().sync.get_items()) == 6
        assert "2 items of 1 session" in rotate()
        assert key_ids() == {key_id(NEW)}


async def test_a_rotation_beside_writers_loses_nothing() -> None:
    with under(OLD):
        await sync_to_async(fill)(30)
    with under(NEW, OLD):
        session = private()

        async def write() -> None:
            for number in range(10):
                await session.add_items([said(f"new {number}")])
                if number % 3 == 2:
                    assert await session.pop_item() == said(f"new {number}")

        async def turn() -> None:
            row = await AgentSession.objects.aget()
            backend = sessions["private"]
            assert isinstance(backend, EncryptedBackend)
            rotation = Rotation(backend, row)
            await backend.threads.run(rotation.run, batch_size=3)

        await asyncio.gather(write(), turn())
        assert len(await session.get_items()) == 30 + 10 - 3
    with under(NEW):
        assert len(await private().get_items()) == 37


def test_paused_runs_are_rotated() -> None:
    with under(OLD):
        fill(1)
        wait(AgentSession.objects.get(), "r", interrupts=asked("tool", TREASURE))
    with under(NEW, OLD):
        assert "2 items of 1 session" in rotate()
    run = AgentRun.objects.get()
    assert key_id(NEW) in run.state
    with under(NEW):
        assert opened("r").interrupts == asked("tool", TREASURE)
    # Under the new key it is bound as it was.
    AgentRun.objects.update(run_id="r-2")
    with under(NEW), pytest.raises(InvalidApproval):
        opened("r-2")


def test_what_was_told_of_runs_is_rotated() -> None:
    with under(OLD):
        fill(1)
        found = Conversation.ensure(sessions["private"], SessionKey("s"))
        run = AgentRun.objects.create(session_id=found.pk, run_id="r")
        for number in (1, 2):
            frames = [Frame("r", number, {"type": "RAW", "event": TREASURE})]
            told = Unwritten(found, run, 0, [Chunk(frames, About())])
            run_rows.add_events("default", event_rows.rows_of(told))
    with under(NEW, OLD):
        assert "3 items of 1 session" in rotate()
    bodies = list(RunEvents.objects.values_list("body", flat=True))
    assert len(bodies) == 2
    assert all(key_id(NEW) in body for body in bodies)
    with under(NEW):
        found = Conversation.ensure(sessions["private"], SessionKey("s"))
        chunks = event_rows.read(found, run.pk)
        assert [chunk.last for chunk in chunks] == [1, 2]
        assert chunks[0].frames[0].event["event"] == TREASURE


def test_with_session_keys_only_these_are_rotated() -> None:
    with under(OLD, session_keys=True):
        items = fill()
    before = sorted(SessionItem.objects.values_list("data", flat=True))
    with under(NEW, session_keys=True):
        out = StringIO()
        with pytest.raises(CommandError):
            call_command("rotate_agent_session_keys", stdout=out, stderr=out)
        assert f"under key {key_id(OLD)}" in out.getvalue()
    with under(NEW, OLD, session_keys=True):
        told = rotate()
        assert "0 items, and 1 session key of 1 session put under" in told
    assert before == sorted(SessionItem.objects.values_list("data", flat=True))
    assert SessionSecret.objects.get().key_id == key_id(NEW)
    with under(NEW, session_keys=True):
        assert private().sync.get_items() == items
    with under(OLD, session_keys=True), pytest.raises(UnknownEncryptionKey):
        private().sync.get_items()


def test_items_from_before_get_under_the_sessions_own_key() -> None:
    with under(NEW):
        fill(2)
    with under(NEW, session_keys=True):
        private().sync.add_items([said("since")])
        assert "2 items" in rotate()
        (own,) = key_ids()
        assert own != key_id(NEW)
        assert len(private().sync.get_items()) == 3


@one_database
def test_aliases_are_named_and_others_refused() -> None:
    with under(OLD):
        fill(1)
    with under(NEW, OLD):
        assert "1 item of" in rotate("--backend", "private", "--progress")
        with pytest.raises(CommandError, match="no EncryptedBackend"):
            rotate("--backend", "default")
        with pytest.raises(CommandError, match="no alias"):
            rotate("--backend", "nowhere")
    with pytest.raises(CommandError, match="has no EncryptedBackend"):
        rotate()


@one_database
def test_a_store_that_can_not_rewrite_is_told() -> None:
    ListBackend.histories.clear()
    inner = {"BACKEND": ListBackend}
    with under(OLD, inner=inner):
        fill(3)
    with under(NEW, OLD, inner=inner):
        private().sync.add_items([said("new")])
        out = StringIO()
        with pytest.raises(CommandError, match="Keep the older keys"):
            call_command("rotate_agent_session_keys", "--batch-size=2", stderr=out)
        assert "private: 3 items under other keys, which ListBackend" in out.getvalue()
        assert len(private().sync.get_items()) == 4
        private().sync.clear()
        fill(1)
        assert "0 items of 0 sessions" in rotate()
        assert len(get_session("s", backend="private").sync.get_items()) == 1


@one_database
def test_session_keys_are_rotated_over_any_store() -> None:
    ListBackend.histories.clear()
    inner = {"BACKEND": ListBackend}
    with under(OLD, inner=inner, session_keys=True):
        items = fill(3)
    with under(NEW, OLD, inner=inner, session_keys=True):
        assert "0 items, and 1 session key of 1 session" in rotate()
    with under(NEW, inner=inner, session_keys=True):
        assert private().sync.get_items() == items
