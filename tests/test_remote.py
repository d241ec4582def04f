"""What backends over other stores share, on a store that is as small as can be."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from agents.memory import Session
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.test import override_settings
from django.utils import timezone

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.loops import BackgroundLoop, with_caller
from agent_sessions.backends.remote import RemoteBackend, Written
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.items import Batch, Item, StoredItem, decode, decode_all
from agent_sessions.models import AgentSession
from agent_sessions.testing import SessionContract

pytestmark = [pytest.mark.one_database, pytest.mark.django_db]


class ListBackend(RemoteBackend):
    """Lists of JSON texts, by owner and id."""

    supports_listing = True
    histories: ClassVar[dict[tuple[Any, str], list[str]]] = {}

    def history(self, key: SessionKey) -> list[str]:
        return self.histories.setdefault((key.user_id, key.session_id), [])

    async def store_append(self, key: SessionKey, batch: Batch) -> Written:
        self.history(key).extend(row.data for row in batch.rows)
        return Written(len(self.history(key)))

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        items = decode_all(self.history(key))
        return items if limit is None else items[-limit:]

    async def store_pop(self, key: SessionKey) -> tuple[Item | None, Written]:
        texts = self.history(key)
        for index in range(len(texts) - 1, -1, -1):
            if (item := decode(texts[index])) is not None:
                del texts[index]
                return item, Written(len(texts))
        return None, Written(len(texts))

    async def store_clear(self, key: SessionKey) -> int:
        return len(self.histories.pop((key.user_id, key.session_id), []))

    async def store_page(
        self, key: SessionKey, *, before: int | None, after: int | None, limit: int
    ) -> Page:
        texts = self.history(key)
        if after is not None:
            start, stop = after, min(after + limit, len(texts))
        else:
            stop = len(texts) if before is None else before - 1
            start = max(stop - limit, 0)
        items = [
            StoredItem(index + 1, 0, decode(text), text, timezone.now())
            for index, text in enumerate(texts[start:stop], start)
        ]
        return Page(items, start > 0, stop < len(texts))

    async def store_ids(self) -> AsyncIterator[str]:
        for user_id, session_id in list(self.histories):
            if user_id is None:
                yield session_id


SETTING = {"default": {"BACKEND": ListBackend, "OPTIONS": {"touch_interval": 0}}}


@pytest.fixture(autouse=True)
def _listed() -> Any:
    with override_settings(AGENT_SESSIONS=SETTING):
        yield


class TestListBackend(SessionContract):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_sync = True
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
def test_the_row_is_left_alone_between_touches(
    django_assert_num_queries: Any,
) -> None:
    setting = {"default": {"BACKEND": ListBackend}}
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session(f"s-{uuid.uuid4()}").sync
        session.add_items([{"role": "user", "content": "Hi"}])
        with django_assert_num_queries(0):
            session.add_items([{"role": "user", "content": "and"}])
            session.get_items(limit=2)
            session.pop_item()


def test_the_sync_face_shares_the_history() -> None:
    session = get_session("s-sync")
    session.sync.add_items([{"role": "user", "content": str(n)} for n in range(5)])
    page = sessions["default"].page(SessionKey("s-sync"), limit=2)
    assert [s.position for s in page.items] == [4, 5]
    assert (page.has_earlier, page.has_later) == (True, False)


class CountingBackend(ListBackend):
    """Looks into the directory from within the store's coroutines."""

    async def store_append(self, key: SessionKey, batch: Batch) -> Written:
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
