"""A long history on SQLite is cleared in steps, between which others write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend, removal
from agent_sessions.exceptions import StorageError
from agent_sessions.managers import removed
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.retention import finish_removals, unfinished_items
from agent_sessions.signals import session_cleared

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

STEP = 4
LONG = 11


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(removal, "_STEP", STEP)
    monkeypatch.setattr(removal, "_SHORT", STEP)
    sessions.reset()
    yield
    sessions.reset()


@pytest.fixture
def told() -> Iterator[list[tuple[str, int]]]:
    heard: list[tuple[str, int]] = []

    def hear(sender: Any, **kwargs: Any) -> None:
        heard.append((kwargs["session_id"], kwargs["count"]))

    session_cleared.connect(hear)
    yield heard
    session_cleared.disconnect(hear)


def said(*texts: Any) -> list[Any]:
    return [{"role": "user", "content": text} for text in texts]


def filled(session_id: str, count: int) -> Any:
    session: Any = DjangoSession(session_id)
    session.sync.add_items(said(*range(count)))
    return session


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


def nothing_is_left() -> bool:
    return not (
        AgentSession._base_manager.filter(removed()).exists()
        or Branch._base_manager.exclude(session__backend="default").exists()
    )


def deletions(queries: CaptureQueriesContext) -> int:
    said = [query["sql"].split() for query in queries.captured_queries]
    table = f'"{SessionItem._meta.db_table}"'
    return sum(words[:3] == ["DELETE", "FROM", table] for words in said)


def test_a_long_history_is_deleted_in_steps(told: list[tuple[str, int]]) -> None:
    session = filled("s", LONG)
    filled("other", 2)
    with CaptureQueriesContext(connection) as queries:
        assert backend().clear(SessionKey("s")) == LONG
    # The last finds nothing, as the branches go.
    assert deletions(queries) == 4
    assert session.sync.get_items() == []
    assert SessionItem._base_manager.count() == 2
    assert nothing_is_left()
    assert told == [("s", LONG)]
    session.sync.add_items(said("next"))
    assert session.sync.get_items() == said("next")
    # Positions are never given twice.
    assert SessionItem._base_manager.latest("position").position == LONG + 1


def test_a_step_is_of_few_statements() -> None:
    session = filled("s", LONG)
    clearing = removal.Clearing(backend().engine, session.key)
    for _ in range(2):
        clearing.step()
    with CaptureQueriesContext(connection) as queries:
        clearing.step()
    said = [query["sql"].split()[0] for query in queries.captured_queries]
    assert said == ["BEGIN", "UPDATE", *["SELECT"] * 2, "DELETE", "UPDATE", "COMMIT"]
    assert SessionItem._base_manager.count() == LONG - 2 * STEP


def test_a_short_one_at_once(told: list[tuple[str, int]]) -> None:
    filled("s", STEP)
    with CaptureQueriesContext(connection) as queries:
        assert backend().clear(SessionKey("s")) == STEP
    assert deletions(queries) == 1
    assert told == [("s", STEP)]


def test_what_a_pop_left_out_ends_no_step() -> None:
    session = filled("s", 3)
    SessionItem._base_manager.filter(position=3).update(position=5_000)
    Branch._base_manager.update(head=5_000)
    session.sync.add_items(said(*range(STEP)))
    assert backend().clear(SessionKey("s")) == 3 + STEP
    assert not SessionItem._base_manager.exists()
    assert nothing_is_left()


def test_others_write_between_the_steps() -> None:
    async def main() -> list[str]:
        done: list[str] = []

        async def clear() -> None:
            await session.clear_session()
            done.append("cleared")

        async def write() -> None:
            # What is asked for while a step is done waits for that one only.
            for text in "abc":
                await other.add_items(said(text))
                done.append(text)

        await asyncio.gather(clear(), write())
        return done

    session, other = filled("s", 40), filled("other", 1)
    assert asyncio.run(main()) == ["a", "b", "c", "cleared"]
    assert len(other.sync.get_items()) == 4
    assert nothing_is_left()


def test_a_cancelled_clear_is_finished_first() -> None:
    async def main() -> None:
        clearing = asyncio.ensure_future(session.clear_session())
        await asyncio.sleep(0)
        clearing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await clearing

    session = filled("s", LONG)
    asyncio.run(main())
    assert not SessionItem._base_manager.exists()
    assert nothing_is_left()


def test_who_is_killed_leaves_an_empty_session_and_the_rest_to_the_next_sweep(
    told: list[tuple[str, int]],
) -> None:
    session = filled("s", LONG)
    clearing = removal.Clearing(backend().engine, session.key)
    for _ in range(2):
        clearing.step()
    assert not clearing.is_done
    assert session.sync.get_items() == []
    assert unfinished_items() == LONG - STEP
    assert told == []
    assert finish_removals() == LONG - STEP
    assert nothing_is_left()
    # Where another has finished it, there is nothing to do.
    clearing.step()
    assert clearing.is_done


def test_a_step_that_fails_loses_nothing() -> None:
    session = filled("s", LONG)
    clearing = removal.Clearing(backend().engine, session.key)
    clearing.step()
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA query_only = 1")
        with pytest.raises(StorageError):
            clearing.step()
        cursor.execute("PRAGMA query_only = 0")
    while not clearing.is_done:
        clearing.step()
    assert nothing_is_left()


def test_in_a_callers_transaction_it_is_one_step_and_can_be_undone() -> None:
    session = filled("s", LONG)
    with transaction.atomic():
        assert backend().clear(session.key) == LONG
        transaction.set_rollback(True)
    assert len(session.sync.get_items()) == LONG


def test_a_run_clears_its_own_session_in_one_step_and_stays() -> None:
    session = filled("s", LONG)
    AgentSession.objects.update(fence=3, run_id="r")
    with CaptureQueriesContext(connection) as queries:
        assert backend().clear(session.key.fenced(3)) == LONG
    assert deletions(queries) == 1
    assert (AgentSession.objects.get().run_id, AgentSession.objects.get().fence) == (
        "r",
        3,
    )
