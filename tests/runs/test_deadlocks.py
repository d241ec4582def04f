"""What asks to be done again, as a deadlock does, is done again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction

from agent_sessions.concurrency.connections import transact
from agent_sessions.models import AgentSession
from tests.settings import DATABASE_KIND

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(DATABASE_KIND == "sqlite", reason="SQLite locks no rows"),
]


def test_both_sides_of_a_deadlock_are_written() -> None:
    rows = [
        AgentSession.objects.create(backend="default", session_id=name)
        for name in ("a", "b")
    ]
    first_lock = threading.Barrier(2)
    tries: list[str] = []

    def write(order: list[AgentSession], title: str) -> None:
        waited = False

        def change() -> None:
            nonlocal waited
            tries.append(title)
            for row in order:
                AgentSession.objects.filter(pk=row.pk).update(title=title)
                if not waited:
                    # Both hold one row before they ask for the other's.
                    waited = True
                    first_lock.wait(timeout=30)

        try:
            transact("default", change)
        finally:
            connections.close_all()

    threads = [
        threading.Thread(target=write, args=(rows, "forth")),
        threading.Thread(target=write, args=(rows[::-1], "back")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    titles = set(AgentSession.objects.values_list("title", flat=True))
    # The one that the database refused came last, and wrote both.
    assert len(tries) == 3
    assert titles == {tries[-1]}


def test_a_transaction_of_the_caller_is_not_repeated() -> None:
    tries: list[Any] = []

    def fail() -> None:
        tries.append(1)
        raise _refusal()

    with transaction.atomic(), pytest.raises(type(_refusal())):
        transact("default", fail)
    assert len(tries) == 1
    with pytest.raises(type(_refusal())):
        transact("default", fail)
    assert len(tries) > 2


def test_a_deadlock_that_psycopg2_tells_is_repeated() -> None:
    class DeadlockDetected(Exception):
        pgcode = "40P01"

    tries: list[Any] = []

    def fail_once() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OperationalError("deadlock detected") from DeadlockDetected()
        return "done"

    assert transact("default", fail_once) == "done"


def _refusal() -> Exception:
    if connection.vendor == "mysql":
        return OperationalError(1213, "Deadlock found")
    from psycopg.errors import SerializationFailure

    error = OperationalError("could not serialize access")
    error.__cause__ = SerializationFailure()
    return error
