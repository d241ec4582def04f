"""Prepared statements on PostgreSQL, and where they are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from agent_sessions import get_session, sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.postgresql import PostgreSQLStatements
from agent_sessions.backends.database.prepared import PreparedStatements
from agent_sessions.exceptions import StorageError
from agent_sessions.models import AgentSession, SessionItem
from tests.settings import DATABASE_KIND

T = TypeVar("T")

ITEM: Any = {"role": "user", "content": "Hello"}
ALTER = f"ALTER TABLE {SessionItem._meta.db_table} ALTER COLUMN data TYPE"


def sql(text: str) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(text)
        return [] if cursor.description is None else cursor.fetchall()


def executions() -> dict[str, int]:
    """Count by their names how often this connection has executed what it prepared."""
    found = sql(
        "SELECT name, generic_plans + custom_plans FROM pg_prepared_statements "
        "WHERE name LIKE 'agent_sessions%'"
    )
    return dict(found)


def turn() -> None:
    session = get_session("prepared").sync
    before = len(session.get_items(50))
    session.add_items([ITEM, ITEM])
    assert len(session.get_items(50)) == before + 2


def close() -> None:
    connection.close()


def statements() -> PreparedStatements:
    backend = sessions["default"]
    assert isinstance(backend, DatabaseBackend)
    found = backend.engine.statements
    assert isinstance(found, PostgreSQLStatements)
    return found.prepared


@pytest.mark.django_db(transaction=True)
class TestPrepared:
    """Prepared statements are given up where they can't be relied on."""

    __test__ = DATABASE_KIND == "postgres"

    @pytest.fixture(autouse=True)
    def _thread(self) -> Iterator[None]:
        sessions.reset()
        with ThreadPoolExecutor(1) as self.threads:
            yield
            self.within(close)
        sessions.reset()

    def within(self, function: Callable[[], T]) -> T:
        """Call in another thread than the main one, whose connection stays."""
        return self.threads.submit(function).result()

    def test_each_is_prepared_once(self) -> None:
        self.within(turn)
        self.within(turn)
        assert sorted(self.within(executions).values()) == [2, 4]

    def test_a_new_connection_prepares_its_own(self) -> None:
        self.within(turn)
        self.within(close)
        self.within(turn)
        assert sorted(self.within(executions).values()) == [1, 2]
        assert statements().enabled

    def test_a_pooler_that_changes_the_connection(self) -> None:
        self.within(turn)
        self.within(lambda: sql("DEALLOCATE ALL"))
        self.within(turn)
        assert not statements().enabled
        self.within(turn)
        assert self.within(executions) == {}
        assert AgentSession.objects.get().item_count == 6

    def test_a_pooler_whose_connection_somebody_else_prepared(self) -> None:
        self.within(turn)
        [(name, text)] = self.within(
            lambda: sql(
                "SELECT name, statement FROM pg_prepared_statements "
                "WHERE statement LIKE 'WITH%INSERT%'"
            )
        )
        self.within(close)
        self.within(lambda: sql(f"PREPARE {name} AS {text}"))
        self.within(turn)
        assert not statements().enabled
        assert AgentSession.objects.get().item_count == 4

    def test_two_backends_share_a_connection(self) -> None:
        self.within(turn)
        sessions.reset()
        self.within(turn)
        assert statements().enabled
        assert sorted(self.within(executions).values()) == [2, 4]

    def test_a_changed_table(self) -> None:
        self.within(turn)
        sql(f"{ALTER} varchar(100000)")
        try:
            self.within(turn)
        finally:
            # Another type forgets how its values are compressed.
            sql(f"{ALTER} text, ALTER COLUMN data SET COMPRESSION lz4")
        assert AgentSession.objects.get().item_count == 4

    def test_none_is_prepared_in_a_callers_transaction(self) -> None:
        def turn_in_a_transaction() -> dict[str, int]:
            with transaction.atomic():
                turn()
                return executions()

        assert self.within(turn_in_a_transaction) == {}

    def test_none_is_prepared_behind_a_pooler_that_django_knows_of(self) -> None:
        settings = connection.settings_dict
        settings["DISABLE_SERVER_SIDE_CURSORS"] = True
        try:
            self.within(turn)
        finally:
            del settings["DISABLE_SERVER_SIDE_CURSORS"]
        assert self.within(executions) == {}

    def test_who_watches_the_statements_sees_them(self) -> None:
        def captured() -> list[str]:
            with CaptureQueriesContext(connection) as queries:
                turn()
            return [query["sql"].split()[0] for query in queries]

        def wrapped() -> int:
            seen = []

            def look(execute: Any, sql: str, *rest: Any) -> Any:
                seen.append(sql)
                return execute(sql, *rest)

            with connection.execute_wrapper(look):
                turn()
            return len(seen)

        self.within(turn)
        assert self.within(captured) == ["SELECT", "WITH", "SELECT"]
        assert self.within(wrapped) == 3

    def test_the_main_thread_can_be_interrupted(self) -> None:
        turn()
        assert executions() == {}

    def test_other_errors_are_told(self) -> None:
        self.within(turn)
        self.within(lambda: sql("SET default_transaction_read_only = on"))
        with pytest.raises(StorageError):
            self.within(lambda: get_session("prepared").sync.add_items([ITEM]))
        assert statements().enabled

    def test_a_lost_connection_is_told(self) -> None:
        self.within(turn)
        [(pid,)] = self.within(lambda: sql("SELECT pg_backend_pid()"))
        sql(f"SELECT pg_terminate_backend({pid}, 5000)")
        with pytest.raises(StorageError, match=r"\(OperationalError: .*connection"):
            self.within(turn)
        self.within(close)
        self.within(turn)
        assert AgentSession.objects.get().item_count == 4
