"""Appends that wait for a session's row while another process makes a branch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, connections, transaction

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentSession, SessionItem
from tests.settings import DATABASE_KIND

pytestmark = [pytest.mark.django_db(transaction=True)]


def said(count: int) -> list[Any]:
    return [{"role": "user", "content": str(number)} for number in range(count)]


def append_during(change: Callable[[Any], Any], key: SessionKey, items: int) -> None:
    """Append two items in another thread, which waits for a change to be committed."""
    session: Any = DjangoSession("s").sync
    session.add_items(said(items))
    errors: list[Exception] = []

    def append() -> None:
        try:
            sessions["default"].append(key, said(2))
        except Exception as exc:
            errors.append(exc)
        finally:
            connections.close_all()

    thread = threading.Thread(target=append)
    with transaction.atomic():
        change(session)
        thread.start()
        thread.join(0.5)
    thread.join()
    assert errors == []


@pytest.mark.parametrize("branch", [None, "main"])
def test_a_long_clear(branch: str | None) -> None:
    key = SessionKey("s", branch=branch)
    append_during(lambda session: session.clear_session(), key, 600)
    assert AgentSession.objects.get().item_count == 2
    assert len(DjangoSession("s").sync.get_items()) == 2


def test_an_undone_turn_of_a_branch_that_is_not_the_current_one() -> None:
    # It puts another branch in the place of the one that is named.
    side = DjangoSession("s", branch="side")

    session: Any = DjangoSession("s").sync
    session.add_items(said(6))
    session.create_branch_from_turn(6, "side")
    session.switch_to_branch("main")
    append_during(lambda _: side.sync.undo_turn(), side.key, 0)
    assert AgentSession.objects.get().item_count == 8
    assert len(side.sync.get_items()) == 6


@pytest.mark.parametrize("fence", [None, 0])
def test_a_new_branch(fence: int | None) -> None:
    # A run with a lease, too, which makes no rows.
    key = SessionKey("s", fence=fence)
    append_during(lambda session: session.create_branch_from_turn(3, "new"), key, 6)
    assert AgentSession.objects.get().item_count == 8
    assert SessionItem.objects.filter(branch__name="new").count() == 2


@pytest.mark.skipif(DATABASE_KIND != "postgres", reason="PostgreSQL's own words.")
def test_row_level_security_lets_many_items_in() -> None:
    session: Any = DjangoSession("s").sync
    session.add_items(said(1))
    table = SessionItem._meta.db_table
    with connection.cursor() as cursor:
        for statement in (
            "CREATE ROLE reader NOLOGIN",
            "GRANT USAGE ON SCHEMA public TO reader",
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO reader",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO reader",
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY everything ON {table} USING (true)",
            "SET ROLE reader",
        ):
            cursor.execute(statement)
        try:
            session.add_items(said(600))
        finally:
            for statement in (
                "RESET ROLE",
                f"DROP POLICY everything ON {table}",
                f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
                "DROP OWNED BY reader",
                "DROP ROLE reader",
            ):
                cursor.execute(statement)
    assert len(session.get_items()) == 601
