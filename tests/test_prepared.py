"""Prepared statements on PostgreSQL, and where they are given up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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

ITEM: Any = {"role": "user", "content": "Hello"}


@pytest.mark.django_db(transaction=True)
class TestPrepared:
    """Prepared statements are given up where they can't be relied on."""

    __test__ = DATABASE_KIND == "postgres"

    @pytest.fixture(autouse=True)
    def _fresh_backend(self) -> Iterator[None]:
        sessions.reset()
        yield
        sessions.reset()
        connection.close()

    def prepared(self) -> PreparedStatements:
        backend = sessions["default"]
        assert isinstance(backend, DatabaseBackend)
        statements = backend.statements(connection)
        assert isinstance(statements, PostgreSQLStatements)
        return statements.prepared

    def turn(self) -> list[str]:
        """Take a turn and give its statements."""
        session = get_session("prepared").sync
        with CaptureQueriesContext(connection) as captured:
            before = len(session.get_items(50))
            session.add_items([ITEM, ITEM])
            assert len(session.get_items(50)) == before + 2
        return [query["sql"] for query in captured.captured_queries]

    def prepares(self, texts: list[str]) -> bool:
        return any(text.startswith(("PREPARE", "EXECUTE")) for text in texts)

    def test_each_is_prepared_once(self) -> None:
        self.turn()
        texts = self.turn()
        assert [text.split()[0] for text in texts] == ["EXECUTE"] * 3

    def test_a_new_connection_prepares_its_own(self) -> None:
        self.turn()
        connection.close()
        assert [text.split()[0] for text in self.turn()] == [
            *("PREPARE", "EXECUTE"),
            *("PREPARE", "EXECUTE"),
            "EXECUTE",
        ]
        assert self.prepared().enabled

    def test_a_pooler_that_changes_the_connection(self) -> None:
        self.turn()
        with connection.cursor() as cursor:
            cursor.execute("DEALLOCATE ALL")
        self.turn()
        assert not self.prepared().enabled
        assert not self.prepares(self.turn())

    def test_a_pooler_whose_connection_somebody_else_prepared(self) -> None:
        self.turn()
        connection.close()
        prepare = self.turn()[0]
        connection.close()
        with connection.cursor() as cursor:
            cursor.execute(prepare)
        self.turn()
        assert not self.prepared().enabled
        assert AgentSession.objects.get().item_count == 6

    def test_two_backends_share_a_connection(self) -> None:
        self.turn()
        sessions.reset()
        self.turn()
        assert self.prepared().enabled

    def test_a_changed_table(self) -> None:
        self.turn()
        alter = f"ALTER TABLE {SessionItem._meta.db_table} ALTER COLUMN data TYPE"
        with connection.cursor() as cursor:
            cursor.execute(f"{alter} varchar(100000)")
            try:
                self.turn()
            finally:
                cursor.execute(f"{alter} text")
        assert AgentSession.objects.get().item_count == 4

    def test_none_is_prepared_in_a_callers_transaction(self) -> None:
        self.turn()
        with transaction.atomic():
            assert not self.prepares(self.turn())

    def test_none_is_prepared_behind_a_pooler_that_django_knows_of(self) -> None:
        settings = connection.settings_dict
        settings["DISABLE_SERVER_SIDE_CURSORS"] = True
        try:
            assert not self.prepares(self.turn())
        finally:
            del settings["DISABLE_SERVER_SIDE_CURSORS"]

    def test_other_errors_are_told(self) -> None:
        self.turn()
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = on")
        with pytest.raises(StorageError):
            get_session("prepared").sync.add_items([ITEM])
        assert self.prepared().enabled
