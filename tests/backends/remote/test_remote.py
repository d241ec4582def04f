"""What backends over other stores share, on a store that is as small as can be."""

from __future__ import annotations

import asyncio
import re
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from agents.memory import Session
from asgiref.sync import sync_to_async
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import OperationalError, connection
from django.test import override_settings
from django.utils import timezone
from django.utils.module_loading import import_string

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.remote.base import RemoteBackend
from agent_sessions.concurrency.loops import BackgroundLoop, with_caller
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.items import Batch
from agent_sessions.models import AgentSession, PendingClear
from agent_sessions.retention.pending import is_cleared
from tests.support.contract import StoreContract
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.one_database, pytest.mark.django_db]


SETTING = {"default": {"BACKEND": ListBackend}}


@pytest.fixture(autouse=True)
def _listed() -> Any:
    with override_settings(AGENT_SESSIONS=SETTING):
        yield
        ListBackend.histories.clear()


class TestListBackend(StoreContract):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    supports_threads = False
    foreign_error = SessionDoesNotExist

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        return await sync_to_async(create)(f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        texts = ListBackend.histories[session.key.user_id, session.session_id]
        original, texts[nth] = texts[nth], data
        return original


def user() -> Any:
    return get_user_model().objects.create_user(f"user-{uuid.uuid4()}")


async def test_the_row_follows_what_is_written() -> None:
    alice = await sync_to_async(user)()
    session = get_session("s-row", user=alice)
    await session.add_items([{"role": "user", "content": "Hi there"}] * 3)
    row = await AgentSession.objects.aget(session_id="s-row")
    assert (row.user_id, row.item_count, row.title) == (alice.pk, 3, "Hi there")
    await session.pop_item()
    await row.arefresh_from_db()
    assert row.item_count == 2
    await session.clear_session()
    await row.arefresh_from_db()
    assert (row.item_count, row.title) == (0, "")


@pytest.mark.django_db(transaction=True)
def test_a_use_asks_the_row_once(django_assert_num_queries: Any) -> None:
    session = get_session(f"s-{uuid.uuid4()}").sync
    session.add_items([{"role": "user", "content": "Hi"}])
    with django_assert_num_queries(1):
        session.get_items(limit=2)
    for write in (lambda: session.add_items([HELLO]), session.pop_item):
        with django_assert_num_queries(2):
            write()


def test_the_sync_face_shares_the_history() -> None:
    session = get_session("s-sync")
    session.sync.add_items([{"role": "user", "content": str(n)} for n in range(5)])
    page = sessions["default"].page(SessionKey("s-sync"), limit=2)
    assert [s.position for s in page.items] == [4, 5]
    assert (page.has_earlier, page.has_later) == (True, False)


class CountingBackend(ListBackend):
    """Looks into the directory from within the store's coroutines."""

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        rows = self.directory.rows(key)
        assert await self.on_directory(rows.update, metadata={"seen": 1}) == 1
        return await super().store_append(key, batch)

    async def store_clear(self, key: SessionKey) -> int:
        return await self.on_directory(lambda: 1 // 0)


def test_a_store_reaches_the_directory_in_its_sync_callers_transaction() -> None:
    setting = {"default": {"BACKEND": CountingBackend}}
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session(f"s-{uuid.uuid4()}")
        session.sync.add_items([{"role": "user", "content": "Hi"}])
        row = AgentSession.objects.get(session_id=session.session_id)
        assert row.metadata == {"seen": 1}
        with pytest.raises(ZeroDivisionError):
            session.sync.clear_session()
        assert len(session.sync.get_items()) == 1


async def test_a_store_reaches_the_directory_of_an_async_caller() -> None:
    setting = {"default": {"BACKEND": CountingBackend}}
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session(f"s-{uuid.uuid4()}")
        await session.add_items([{"role": "user", "content": "Hi"}])
        row = await AgentSession.objects.aget(session_id=session.session_id)
        assert row.metadata == {"seen": 1}
        with pytest.raises(ZeroDivisionError):
            await session.clear_session()


async def test_an_errand_of_a_caller_who_is_gone_is_not_waited_for() -> None:
    """After Ctrl-C in the waiting thread nothing waits for it for ever."""
    background = BackgroundLoop("test-errands")

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def ask() -> None:
        await with_caller(interrupt)

    def run() -> str:
        try:
            background.run(ask())
        except KeyboardInterrupt:
            return "interrupted"
        return "ended"

    assert await sync_to_async(run)() == "interrupted"
    background.close()


# -- the directory's rows --------------------------------------------------------------

HELLO: Any = {"role": "user", "content": "Hello"}


def count_of(session_id: str) -> int:
    count: int = AgentSession.objects.get(session_id=session_id).item_count
    return count


@pytest.mark.parametrize("round", [1, 2])
def test_each_test_begins_anew_with_the_same_id(round: int) -> None:
    """Each of two TestCases with the same id finds its row and its owner."""
    session = get_session("s-rolled-back", user=user()).sync
    session.add_items([HELLO])
    assert count_of("s-rolled-back") == 1
    session.add_items([HELLO])
    assert count_of("s-rolled-back") == 2


class Uncounted(ListBackend):
    """A store that tells no numbers."""

    tells_counts = False

    async def store_append(self, key: SessionKey, batch: Batch) -> Any:
        await super().store_append(key, batch)


def test_a_row_adds_up_and_is_corrected_by_a_whole_reading() -> None:
    with override_settings(AGENT_SESSIONS={"default": {"BACKEND": Uncounted}}):
        session = get_session("s-adds").sync
        session.add_items([HELLO] * 3)
        session.pop_item()
        assert count_of("s-adds") == 2
        for wrong in (0, 9):
            AgentSession.objects.update(item_count=wrong)
            session.get_items(limit=2)
            assert count_of("s-adds") == wrong
            session.get_items(limit=3)
            assert count_of("s-adds") == 2
        AgentSession.objects.update(item_count=0)
        session.pop_item()
        assert count_of("s-adds") == 0


@pytest.mark.django_db(transaction=True)
def test_a_session_deleted_by_another_process_gets_its_row_again() -> None:
    session = get_session("s-deleted")
    session.sync.add_items([HELLO])
    # What a process does that this one hears nothing of.
    is_cleared(AgentSession.objects.get()).delete()
    session.sync.add_items([HELLO])
    assert count_of("s-deleted") == 2


@pytest.mark.django_db(transaction=True)
def test_what_a_flush_takes_is_not_remembered() -> None:
    """Each of two TransactionTestCases with the same id finds its row."""
    wrapping = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "default", "keys": [Fernet.generate_key().decode()]},
    }
    with override_settings(AGENT_SESSIONS={**SETTING, "wrapping": wrapping}):
        for name in ("default", "wrapping"):
            session = get_session("s-flushed", backend=name).sync
            session.add_items([HELLO])
            call_command("flush", interactive=False, verbosity=0)
            session.add_items([HELLO])
            assert AgentSession.objects.get().backend == name


class Overtaken(ListBackend):
    """The first of two writers is told how many items there are, and sleeps."""

    events: tuple[asyncio.Event, asyncio.Event] | None = None

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        count = await super().store_append(key, batch)
        if (events := self.events) is not None:
            asleep, awake = events
            self.events = None
            asleep.set()
            await awake.wait()
        return count


@pytest.mark.parametrize("there", [0, 1])
@pytest.mark.parametrize("has_row", [True, False])
async def test_counts_of_writers_that_overtake_each_other_add_up(
    there: int, has_row: bool
) -> None:
    with override_settings(AGENT_SESSIONS={"default": {"BACKEND": Overtaken}}):
        session = get_session("s-both")
        backend: Any = sessions["default"]
        if has_row:
            await session.add_items([HELLO])
            await session.pop_item()
        ListBackend.histories[None, "s-both"] = ["{}"] * there
        if has_row:
            await backend.apage(session.key)
        backend.events = asleep, awake = asyncio.Event(), asyncio.Event()
        first = asyncio.ensure_future(session.add_items([HELLO]))
        await asleep.wait()
        await session.add_items([HELLO] * 2)
        awake.set()
        await first
        assert await sync_to_async(count_of)("s-both") == there + 3


class Interrupted(ListBackend):
    """Something happens to the row while the store writes."""

    meanwhile: Any = None

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        count = await super().store_append(key, batch)
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            await self.on_directory(meanwhile)
        return count


@pytest.mark.django_db(transaction=True)
def test_what_is_written_while_its_owner_is_deleted_is_removed() -> None:
    with override_settings(AGENT_SESSIONS={"default": {"BACKEND": Interrupted}}):
        alice = user()
        session = get_session("s-owned", user=alice)
        session.sync.add_items([HELLO])
        backend: Any = sessions["default"]
        backend.meanwhile = alice.delete
        session.sync.add_items([HELLO])
        assert not any(ListBackend.histories.values())
        assert not AgentSession.objects.exists()
        assert not PendingClear.objects.exists()
        # Known or not to this process: nobody writes for an owner who is gone.
        with pytest.raises(SessionDoesNotExist):
            session.sync.add_items([HELLO])
        assert not any(ListBackend.histories.values())


@pytest.mark.django_db(transaction=True)
def test_what_is_written_while_its_row_is_deleted_gets_one() -> None:
    with override_settings(AGENT_SESSIONS={"default": {"BACKEND": Interrupted}}):
        session = get_session("s-deleted")
        session.sync.add_items([HELLO])
        backend: Any = sessions["default"]
        backend.meanwhile = lambda: is_cleared(AgentSession.objects.get()).delete()
        session.sync.add_items([HELLO])
        assert count_of("s-deleted") == 2


@pytest.mark.django_db(transaction=True)
def test_a_row_that_cannot_be_touched_fails_no_write(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = get_session("s-locked")
    session.sync.add_items([HELLO])

    def refuse(execute: Any, sql: str, *args: Any) -> Any:
        if sql.startswith("UPDATE"):
            raise OperationalError("database is locked")
        return execute(sql, *args)

    with connection.execute_wrapper(refuse):
        session.sync.add_items([HELLO])
    assert "could not be touched (OperationalError)" in caplog.text
    assert count_of("s-locked") == 1
    sessions["default"].page(session.key, limit=1)
    assert count_of("s-locked") == 2


def test_a_store_that_can_lists_what_has_no_owner() -> None:
    for number in range(3):
        ListBackend.histories[None, f"s-{number}"] = ["{}"]
    get_session("s-owned", user=user()).sync.add_items([HELLO])
    backend: Any = sessions["default"]
    assert {f"s-{number}" for number in range(3)} <= set(backend.list_ids())
    assert "s-owned" not in backend.list_ids()


def test_a_store_that_cannot_list_says_so() -> None:
    class Mute(ListBackend):
        store_ids = RemoteBackend.store_ids

    with pytest.raises(NotImplementedError, match="Mute can't list its sessions"):
        list(Mute("mute", {}).list_ids())


def test_rows_expire_and_are_cleared_like_all_others() -> None:
    session = get_session("s-expired")
    session.sync.add_items([HELLO])
    past = timezone.now() - timedelta(days=1)
    AgentSession.objects.filter(session_id="s-expired").update(expires_at=past)
    call_command("clear_agent_sessions", "--expired", "--noinput", verbosity=0)
    assert session.sync.get_items() == []


# -- the example of the docs -----------------------------------------------------------


def test_the_docs_show_this_very_backend() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "backends.md").read_text(encoding="utf-8")
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "class ListBackend" in block
    ]
    source = (root / "tests" / "support" / "list_backend.py").read_text(
        encoding="utf-8"
    )
    assert example.strip() == source.partition("annotations\n")[2].strip()
    lines = example[example.index("class ListBackend") :].splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


def test_the_docs_name_backends_that_there_are() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "backends.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(agent_sessions\.backends\.[\w.]+)`", page, re.MULTILINE)
    assert len(named) == 6
    for path in named:
        assert issubclass(import_string(path), BaseSessionBackend)
