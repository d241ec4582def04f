"""Users who are deleted with their sessions by other ways than the admin's page."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.models.signals import post_delete
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import get_session
from agent_sessions.models import AgentSession, Branch, PendingClear, SessionItem
from agent_sessions.retention import finish_removals, pending, removal

pytestmark = [pytest.mark.django_db(transaction=True)]


def owner(name: str = "alice") -> Any:
    user: Any = get_user_model().objects.create(username=name)
    session: Any = get_session(f"room of {name}", user=user)
    session.sync.add_items([{"role": "user", "content": "Hi"}])
    return user


def test_who_listens_to_deletions_may_read_every_column() -> None:
    user = get_user_model().objects.create(username="alice")
    AgentSession.objects.create(session_id="empty", user=user, title="Nothing yet")
    told: list[str] = []

    def listen(instance: AgentSession, **kwargs: Any) -> None:
        told.append(instance.title)

    post_delete.connect(listen, sender=AgentSession)
    try:
        user.delete()
    finally:
        post_delete.disconnect(listen, sender=AgentSession)
    assert told == ["Nothing yet"]


def test_the_commit_of_many_users_takes_as_long_as_that_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    finish = removal.finish_removals

    def count(**kwargs: Any) -> int:
        calls.append(kwargs)
        return finish(**kwargs)

    monkeypatch.setattr(removal, "finish_removals", count)
    for number in range(3):
        owner(f"user {number}")
    get_user_model().objects.filter(username__startswith="user").delete()
    assert calls == [{"seconds": pending.COMMIT_SECONDS}]
    assert not SessionItem._base_manager.exists()


def test_who_has_no_time_left_looks_at_no_session() -> None:
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"{number}", removed_at=timezone.now())
        for number in range(60)
    )
    with CaptureQueriesContext(connection) as queries:
        finish_removals(seconds=0)
    assert len(queries) < 10


def test_users_of_a_proxy_too() -> None:
    user: Any = get_user_model()

    class Customer(user):  # type: ignore[misc]
        class Meta:
            proxy = True
            app_label = "auth"

    try:
        apps.get_app_config("agent_sessions").ready()
        owner()
        Customer.objects.all().delete()
    finally:
        del apps.all_models["auth"]["customer"]
        apps.clear_cache()
    assert not AgentSession._base_manager.exists()


def test_more_sessions_than_a_statement_of_sqlite_takes_parameters() -> None:
    alice = owner()
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"{number}", user=alice) for number in range(300)
    )
    rows = AgentSession.objects.filter(branch=None)
    Branch.objects.bulk_create(Branch(session=row, head=1) for row in rows)
    if connection.vendor == "sqlite":
        limit = sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER
        before = connection.connection.setlimit(limit, 250)
    try:
        alice.delete()
    finally:
        if connection.vendor == "sqlite":
            connection.connection.setlimit(limit, before)
    assert not AgentSession._base_manager.exists()


def test_an_alias_that_kept_its_items_in_the_database_before(settings: Any) -> None:
    alice = owner()
    settings.AGENT_SESSIONS = {
        "default": {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            # Nothing listens there.
            "OPTIONS": {"url": "redis://127.0.0.1:1/0"},
        }
    }
    alice.delete()
    assert not AgentSession._base_manager.exists()
    assert PendingClear.objects.get().session_id == "room of alice"
