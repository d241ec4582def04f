"""What deleted sessions leave in other stores, and how it is removed for certain."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.remote.erasure import CLAIM
from agent_sessions.exceptions import StoreBusy, StoreUnavailable
from agent_sessions.models import AgentSession, PendingClear
from agent_sessions.retention.pending import count_pending, is_cleared, retry_pending
from tests.servers.redis import redis, url
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db(transaction=True)]


class FailingBackend(ListBackend):
    """A store that can be down, and that may take long to clear."""

    histories: ClassVar[dict[tuple[Any, str], list[str]]] = {}
    down: ClassVar[bool] = False
    asked: ClassVar[list[str]] = []

    async def store_append(self, key: SessionKey, batch: Any) -> Any:
        if self.down:
            raise StoreUnavailable("The store is down.")
        return await super().store_append(key, batch)

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        self.asked.append(key.session_id)
        if self.down:
            raise StoreUnavailable("The store is down.")
        return await super().store_erase(key, remote_id)


SETTING = {
    "default": {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"},
    "lists": {"BACKEND": FailingBackend},
}
HELLO: Any = {"role": "user", "content": "Hello"}


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    FailingBackend.down = False
    FailingBackend.histories.clear()
    FailingBackend.asked.clear()
    with override_settings(AGENT_SESSIONS=SETTING):
        yield


def user() -> Any:
    return get_user_model()._default_manager.create_user(f"user-{uuid.uuid4()}")


def fill(owner: Any, *ids: str, backend: str = "lists") -> None:
    for session_id in ids:
        get_session(session_id, user=owner, backend=backend).sync.add_items([HELLO])


def delete_user(owner: Any) -> None:
    owner.delete()


def delete_users(owner: Any) -> None:
    type(owner)._default_manager.filter(pk=owner.pk).delete()


def delete_rows(owner: Any) -> None:
    AgentSession.objects.filter(user=owner).delete()


def delete_each_row(owner: Any) -> None:
    for row in AgentSession.objects.filter(user=owner):
        row.delete()


WAYS = [delete_user, delete_users, delete_rows, delete_each_row]


@pytest.mark.parametrize("delete", WAYS)
def test_a_deletion_takes_the_history_along(delete: Any) -> None:
    alice, bob = user(), user()
    fill(alice, "a-1", "a-2")
    fill(bob, "b-1")
    delete(alice)
    assert list(FailingBackend.histories) == [(bob.pk, "b-1")]
    assert not PendingClear.objects.exists()
    assert not AgentSession.objects.filter(session_id__startswith="a-").exists()


@pytest.mark.parametrize("delete", WAYS)
def test_a_store_that_is_down_is_asked_again(delete: Any) -> None:
    alice = user()
    fill(alice, "a-1", "a-2")
    FailingBackend.down = True
    pk = alice.pk
    delete(alice)
    rows = PendingClear.objects.order_by("session_id")
    assert [(r.backend, r.session_id, r.owner) for r in rows] == [
        ("lists", "a-1", str(pk)),
        ("lists", "a-2", str(pk)),
    ]
    report = retry_pending()
    assert (report.cleared, report.left) == (0, {"lists": 2})
    assert report.reasons == {"lists": "StoreUnavailable"}
    assert count_pending() == {"lists": 2}
    FailingBackend.down = False
    assert retry_pending("default").cleared == 0
    report = retry_pending("lists")
    assert (report.cleared, report.items, report.left) == (2, 2, {})
    assert not FailingBackend.histories
    assert not PendingClear.objects.exists()


def test_a_store_that_is_down_is_asked_once_for_all() -> None:
    alice = user()
    fill(alice, "a-1", "a-2", "a-3")
    FailingBackend.down = True
    delete_rows(alice)
    assert len(FailingBackend.asked) == 1
    retry_pending()
    assert len(FailingBackend.asked) == 2


@transaction.atomic
def fail_to_delete(owner: Any) -> None:
    delete_rows(owner)
    raise RuntimeError


def test_a_rolled_back_deletion_leaves_everything() -> None:
    alice = user()
    fill(alice, "a-1")
    with transaction.atomic():
        delete_rows(alice)
        assert PendingClear.objects.count() == 1
        transaction.set_rollback(True)
    with transaction.atomic():
        with pytest.raises(RuntimeError):
            fail_to_delete(alice)
        fill(alice, "a-2")
        AgentSession.objects.get(session_id="a-2").delete()
    assert list(FailingBackend.histories) == [(alice.pk, "a-1")]
    assert not PendingClear.objects.exists()
    assert AgentSession.objects.get().session_id == "a-1"


def test_sessions_of_the_database_pay_nothing() -> None:
    counts = []
    # One alone is deleted as a long one is, in steps of its own; these in one step.
    for number in (2, 10):
        alice = user()
        fill(alice, *(f"{alice.pk}-{n}" for n in range(number)), backend="default")
        with CaptureQueriesContext(connection) as queries:
            alice.delete()
        counts.append(len(queries))
    assert counts[0] == counts[1]
    assert not AgentSession.objects.exists()


def test_a_session_of_the_same_name_begins_empty() -> None:
    alice = user()
    fill(alice, "a-1")
    FailingBackend.down = True
    delete_rows(alice)
    with pytest.raises(StoreUnavailable):
        get_session("a-1", user=alice, backend="lists").sync.get_items()
    FailingBackend.down = False
    session = get_session("a-1", user=alice, backend="lists").sync
    assert session.get_items() == []
    session.add_items([HELLO])
    assert retry_pending().cleared == 0
    assert session.get_items() == [HELLO]


async def test_it_begins_empty_for_an_async_caller_too() -> None:
    FailingBackend.histories[None, "open"] = ["{}"]
    await PendingClear.objects.acreate(backend="lists", session_id="open")
    session = get_session("open", backend="lists")
    await session.add_items([HELLO])
    assert await session.get_items() == [HELLO]
    assert not await PendingClear.objects.aexists()


def test_what_another_process_removes_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FailingBackend.histories[None, "open"] = ["{}"]
    row = PendingClear.objects.create(
        backend="lists", session_id="open", attempts=1, tried_at=timezone.now()
    )
    report = retry_pending()
    assert (report.cleared, report.left, report.reasons) == (0, {"lists": 1}, {})
    monkeypatch.setattr("agent_sessions.backends.remote.erasure._PATIENCE", 0.0)
    with pytest.raises(StoreBusy):
        get_session("open", backend="lists").sync.get_items()
    # It was killed.
    row.tried_at = timezone.now() - 2 * CLAIM
    row.save()
    assert retry_pending().cleared == 1
    assert not FailingBackend.histories


def test_an_alias_that_is_gone_is_reported_and_kept() -> None:
    alice = user()
    fill(alice, "a-1")
    fill(alice, "d-1", backend="default")
    rest = {"other": SETTING["default"]}
    with override_settings(AGENT_SESSIONS=rest):
        alice.delete()
        # What has its items in the database needs no other store.
        assert count_pending() == {"lists": 1}
        assert retry_pending().reasons == {"lists": "InvalidBackend"}
    assert retry_pending().cleared == 1


def test_what_was_cleared_already_is_not_cleared_again() -> None:
    fill(None, "open")
    row = AgentSession.objects.get()
    sessions["lists"].clear(SessionKey("open"))
    is_cleared(row).delete()
    assert FailingBackend.asked == []


def test_a_commit_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_sessions.retention.pending.COMMIT_SECONDS", 0.0)
    alice = user()
    fill(alice, "a-1", "a-2")
    alice.delete()
    assert count_pending() == {"lists": 2}
    assert retry_pending().items == 2


@pytest.mark.parametrize("age", [timedelta(0), timedelta(days=400)])
def test_the_owner_is_remembered_though_deleted(age: timedelta) -> None:
    alice = user()
    fill(alice, "a-1")
    FailingBackend.down = True
    alice.delete()
    FailingBackend.down = False
    PendingClear.objects.update(created_at=timezone.now() - age)
    assert retry_pending().items == 1


@pytest.mark.one_database
@pytest.mark.usefixtures("valkey_server")
def test_a_real_server_that_refuses_is_asked_again() -> None:
    """As after a failover: a replica takes no writes until it is made a master."""
    import redis as client

    with redis("valkey") as server, client.Redis(port=server.port) as admin:
        store = {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": {"url": url(server)},
        }
        with override_settings(AGENT_SESSIONS={**SETTING, "redis": store}):
            alice, bob = user(), user()
            fill(alice, "a-1", "a-2", backend="redis")
            fill(bob, "b-1", backend="redis")
            fill(None, "open", backend="redis")
            admin.execute_command("REPLICAOF", "127.0.0.1", "1")
            alice.delete()
            report = retry_pending()
            assert report.left == {"redis": 2}
            assert report.reasons == {"redis": "StoreReadOnly"}
            assert len(list(admin.scan_iter("*:messages"))) == 4
            admin.execute_command("REPLICAOF", "NO", "ONE")
            report = retry_pending()
            assert (report.cleared, report.items, report.left) == (2, 2, {})
            assert len(list(admin.scan_iter("*:messages"))) == 2
            for owner, name in ((bob, "b-1"), (None, "open")):
                session = get_session(name, user=owner, backend="redis")
                assert session.sync.get_items() == [HELLO]
            sessions.reset()


class BrokenStore(FailingBackend):
    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        self.asked.append(key.session_id)
        if key.session_id == "a-1":
            raise ValueError("secret text")
        return await super().store_erase(key, remote_id)


def test_one_history_that_fails_does_not_stop_the_others(caplog: Any) -> None:
    setting = {**SETTING, "lists": {"BACKEND": BrokenStore}}
    with override_settings(AGENT_SESSIONS=setting):
        alice = user()
        fill(alice, "a-1", "a-2")
        alice.delete()
        row = PendingClear.objects.get()
        assert (row.session_id, row.error_code, row.attempts) == (
            "a-1",
            "ValueError",
            1,
        )
        assert "ValueError" in caplog.text
        assert "secret text" not in caplog.text


@pytest.mark.one_database
def test_an_encrypted_history_goes_with_its_user_too() -> None:
    private = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "lists", "keys": ["k" * 32]},
    }
    with override_settings(AGENT_SESSIONS={**SETTING, "private": private}):
        alice = user()
        fill(alice, "a-1", backend="private")
        FailingBackend.down = True
        alice.delete()
        assert count_pending() == {"private": 1}
        FailingBackend.down = False
        assert retry_pending().cleared == 1
    assert not any(FailingBackend.histories.values())


class Unerasable(FailingBackend):
    """The owner is deleted while the store writes, and nothing is erased."""

    leaver: ClassVar[Any] = None

    async def store_append(self, key: SessionKey, batch: Any) -> Any:
        count = await super().store_append(key, batch)
        if self.leaver is not None:
            await self.on_directory(self.leaver.delete)
            await self.on_directory(PendingClear.objects.all().delete)
        return count

    async def store_erase(self, key: SessionKey, remote_id: str) -> int:
        raise StoreUnavailable("The store is down.")


def test_what_is_written_after_the_deletion_is_not_forgotten(caplog: Any) -> None:
    setting = {**SETTING, "lists": {"BACKEND": Unerasable}}
    with override_settings(AGENT_SESSIONS=setting):
        alice = user()
        session = get_session("a-1", user=alice, backend="lists")
        session.sync.add_items([HELLO])
        Unerasable.leaver = alice
        session.sync.add_items([HELLO])
        Unerasable.leaver = None
        assert "history is still in 'lists' (StoreUnavailable)" in caplog.text
        assert count_pending() == {"lists": 1}
    assert retry_pending().items == 2
