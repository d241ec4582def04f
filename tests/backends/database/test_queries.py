"""How few statements the hot path takes, and what PostgreSQL makes of them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections, transaction
from django.db.models import F, Func
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.exceptions import (
    BranchDoesNotExist,
    InvalidItem,
    SessionDoesNotExist,
    StorageError,
)
from agent_sessions.items import encode_batch
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.settings import DATABASE_KIND

ITEM: Any = {"role": "user", "content": "Hello"}
# What begins and ends transactions, and says how PostgreSQL plans in them.
_ASIDE = ("BEGIN", "SET LOCAL", "COMMIT", "SAVEPOINT", "RELEASE")


def messages(count: int) -> list[Any]:
    """Return items as an SDK run stores them."""
    return [{"role": "user", "content": f"Message {n}"} for n in range(count)]


def statements(call: Callable[[], Any]) -> tuple[int, int]:
    """Count the statements of a call, and the transactions that it begins."""
    with CaptureQueriesContext(connection) as captured:
        call()
    texts = [query["sql"] for query in captured.captured_queries]
    begun = sum(text.startswith("BEGIN") for text in texts)
    return sum(not text.startswith(_ASIDE) for text in texts), begun


def plan(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the plan that the statement of a call has once it is kept prepared."""
    seen: list[tuple[str, Sequence[Any]]] = []

    def look(execute: Any, sql: str, params: Sequence[Any], *rest: Any) -> Any:
        seen.append((sql, params))
        return execute(sql, params, *rest)

    with connection.execute_wrapper(look):
        call()
    [(statement, params)] = seen
    first, *others = statement.split("%s")
    text = first + "".join(f"${n}{part}" for n, part in enumerate(others, 1))
    execute = f"EXECUTE looked_at ({', '.join(['%s'] * len(others))})"
    with connection.cursor() as cursor:
        cursor.execute(f"PREPARE looked_at AS {text}")
        # PostgreSQL keeps the plan after some executions.
        for _ in range(10):
            cursor.execute(execute, params)
        cursor.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {execute}", params
        )
        (answer,) = cursor.fetchone()
        cursor.execute("DEALLOCATE looked_at")
    found = json.loads(answer) if isinstance(answer, str) else answer
    return dict(found[0]["Plan"])


def nodes(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a plan's nodes, the outermost first."""
    return [tree, *(node for inner in tree.get("Plans", []) for node in nodes(inner))]


def default_backend() -> DatabaseBackend:
    backend = sessions["default"]
    assert isinstance(backend, DatabaseBackend)
    return backend


@pytest.mark.django_db(transaction=True)
class TestStatements:
    """Outside of a transaction, where each call has what it needs and no more."""

    # A further append: PostgreSQL does all in one statement, SQLite in two updates and
    # the rows, MariaDB has to look after each update.
    append = {"postgres": (1, 0), "sqlite": (3, 1), "mariadb": (5, 1)}[DATABASE_KIND]

    def test_reading_takes_one(self) -> None:
        session = get_session("read").sync
        session.add_items(messages(20))
        assert statements(session.get_items) == (1, 0)
        assert statements(lambda: session.get_items(5)) == (1, 0)
        assert statements(lambda: session.get_items(500)) == (1, 0)

    def test_reading_nothing_asks_whose_it_is(self) -> None:
        session = get_session("new").sync
        assert statements(session.get_items) == (2, 0)
        assert statements(lambda: session.get_items(0)) == (1, 0)

    @pytest.mark.parametrize("size", [1, 2, 100])
    def test_a_further_append_takes_as_many_at_any_size(self, size: int) -> None:
        session = get_session("append").sync
        session.add_items(messages(1))
        assert statements(lambda: session.add_items(messages(size))) == self.append

    def test_a_further_append_under_a_lease_takes_no_more(self) -> None:
        get_session("leased").sync.add_items(messages(1))
        key = SessionKey("leased", fence=AgentSession.objects.get().fence)
        backend = default_backend()
        assert statements(lambda: backend.append(key, [ITEM])) == self.append

    def test_the_first_append_makes_the_rows(self) -> None:
        session = get_session("first").sync
        tried, begun = 1, int(DATABASE_KIND != "postgres")
        made = 6
        # What makes the rows appends to them, in the same transaction.
        expected = (tried + made + self.append[0], begun + 1)
        assert statements(lambda: session.add_items([ITEM])) == expected

    def test_an_empty_append_takes_none(self) -> None:
        session = get_session("none").sync
        assert statements(lambda: session.add_items([])) == (0, 0)

    def test_popping_takes_as_many_at_any_length(self) -> None:
        session = get_session("pop").sync
        session.add_items(messages(2))
        session.pop_item()
        few = statements(session.pop_item)
        session.add_items(messages(300))
        session.pop_item()
        assert statements(session.pop_item) == few
        assert few[0] <= 8
        assert few[1] == 1

    def test_a_pop_takes_as_many_as_the_docs_say(self) -> None:
        """The session's row, its branch, the newest rows; the item, the count, the turn."""
        session = get_session("pop").sync
        session.add_items([*messages(2), {"role": "assistant", "content": "Hi"}])
        # PostgreSQL does all but the first in one.
        is_one = connection.vendor == "postgresql"
        assert statements(session.pop_item) == (2 if is_one else 5, 1)
        # A user's message ends a turn.
        assert statements(session.pop_item) == (2 if is_one else 6, 1)

    def test_popping_from_an_empty_history(self) -> None:
        session = get_session("pop").sync
        session.add_items([ITEM])
        session.pop_item()
        tried = 1 if connection.vendor == "postgresql" else 0
        assert statements(session.pop_item) == (3 + tried, 1)

    def test_clearing_takes_as_many_at_any_length(self) -> None:
        session = get_session("clear").sync
        session.add_items(messages(2))
        few = statements(session.clear)
        session.add_items(messages(300))
        assert statements(session.clear) == few
        # On SQLite three of them find out whether it is long.
        assert few[0] <= 11
        assert few[1] == 1


def refuse_inserts(execute: Any, sql: str, *args: Any) -> Any:
    """Fail where an append inserts its rows."""
    table = SessionItem._meta.db_table
    if "INSERT INTO" in sql and table in sql:
        raise DatabaseError("refused")
    return execute(sql, *args)


def refuse_commits(execute: Any, sql: str, *args: Any) -> Any:
    if sql == "COMMIT":
        raise DatabaseError("refused")
    return execute(sql, *args)


@pytest.mark.django_db(transaction=True)
class TestAppendsOwnTransaction:
    """On SQLite an append begins and ends its transaction itself."""

    @pytest.fixture(autouse=True)
    def _one_item(self) -> None:
        get_session("s").sync.add_items([ITEM])

    def stored(self) -> tuple[int, int, int]:
        counted = AgentSession.objects.values_list("item_count", "branch__head").get()
        return (*counted, SessionItem.objects.count())

    def test_what_fails_half_way_leaves_nothing(self) -> None:
        with (
            connection.execute_wrapper(refuse_inserts),
            pytest.raises(StorageError),
        ):
            get_session("s").sync.add_items([ITEM, ITEM])
        assert self.stored() == (1, 1, 1)
        assert connection.get_autocommit()
        assert not connection.in_atomic_block
        get_session("s").sync.add_items([ITEM])
        assert self.stored() == (2, 2, 2)

    def test_the_callers_transaction_outlives_a_failure(self) -> None:
        session = get_session("s").sync
        with transaction.atomic():
            session.add_items([ITEM])
            with (
                connection.execute_wrapper(refuse_inserts),
                pytest.raises(StorageError),
            ):
                session.add_items([ITEM])
            session.add_items([ITEM])
        assert self.stored() == (3, 3, 3)

    def test_the_callers_transaction_takes_it_back(self) -> None:
        with transaction.atomic():
            get_session("s").sync.add_items([ITEM])
            transaction.set_rollback(True)
        assert self.stored() == (1, 1, 1)

    @pytest.mark.skipif(
        DATABASE_KIND != "sqlite", reason="Only SQLite's COMMIT is a statement here."
    )
    def test_a_refused_commit_leaves_nothing(self) -> None:
        with (
            connection.execute_wrapper(refuse_commits),
            pytest.raises(StorageError),
        ):
            get_session("s").sync.add_items([ITEM])
        assert self.stored() == (1, 1, 1)
        get_session("s").sync.add_items([ITEM])
        assert self.stored() == (2, 2, 2)

    @pytest.mark.skipif(
        DATABASE_KIND != "sqlite", reason="Only SQLite's ROLLBACK is a statement here."
    )
    def test_a_connection_that_cannot_roll_back_is_closed(self) -> None:
        def refuse(execute: Any, sql: str, *args: Any) -> Any:
            if sql == "ROLLBACK":
                raise DatabaseError("refused")
            return refuse_inserts(execute, sql, *args)

        with connection.execute_wrapper(refuse), pytest.raises(StorageError):
            get_session("s").sync.add_items([ITEM])
        assert connection.connection is None
        assert self.stored() == (1, 1, 1)


@pytest.mark.django_db(transaction=True)
class TestLargeBatches:
    """PostgreSQL copies them; everywhere they are as whole as small ones."""

    texts = ("\x00", "\ud800", "\\N", "tab\there", "line\nfeed\r", "\\.", "'é😀\"", "")

    def items(self) -> list[Any]:
        return [
            {"role": "user", "content": f"{text}{number}{text}"}
            for number, text in zip(range(1_200), cycle(self.texts), strict=False)
        ]

    def test_they_come_back_as_they_were_given(self) -> None:
        session = get_session("large").sync
        session.add_items([ITEM])
        session.add_items(self.items())
        session.add_items([ITEM])
        assert session.get_items() == [ITEM, *self.items(), ITEM]
        count = len(self.items()) + 2
        row = AgentSession.objects.get(session_id="large")
        branch = Branch.objects.get(session=row)
        assert (row.item_count, branch.head, branch.turn) == (count, count, count)
        places = SessionItem.objects.order_by("position").values_list(
            "position", "turn", "type", "role"
        )
        assert list(places) == [
            (number, number, "message", "user") for number in range(1, count + 1)
        ]

    def test_columns_are_those_of_a_small_batch(self) -> None:
        few = self.items()[:8]
        for text in ("back\\slash", "tab\t", "line\nfeed\r", "\\N"):
            few += [
                {"role": text, "content": text, "type": text},
                {"type": "function_call", "call_id": text, "name": text},
            ]
        get_session("small").sync.add_items(few)
        get_session("large").sync.add_items(few + self.items())
        columns = ("data", "type", "role", "call_id", "tool_name", "text", "size")
        small, large = (
            list(
                SessionItem.objects.filter(branch__session__session_id=name)
                .order_by("position")
                .values_list(*columns)[: len(few)]
            )
            for name in ("small", "large")
        )
        assert small == large

    def test_an_item_that_is_none_stores_nothing(self) -> None:
        wrong = [*self.items()[:900], {"role": "user", "content": float("nan")}]
        with pytest.raises(InvalidItem, match="Item 900 of 901"):
            get_session("large").sync.add_items(wrong)
        assert not AgentSession.objects.exists()
        get_session("large").sync.add_items([ITEM])
        with transaction.atomic():
            with pytest.raises(InvalidItem, match="Item 900 of 901"):
                get_session("large").sync.add_items(wrong)
            # The caller's transaction goes on.
            get_session("large").sync.add_items([ITEM])
        assert get_session("large").sync.get_items() == [ITEM, ITEM]
        assert AgentSession.objects.get().item_count == 2

    def test_what_fails_on_the_way_leaves_nothing(self) -> None:
        session = get_session("large").sync
        session.add_items([ITEM])
        branch = Branch.objects.get()
        # Lies where the batch will come to.
        SessionItem.objects.create(branch=branch, position=900, data="{}")
        with pytest.raises(StorageError):
            session.add_items(self.items())
        assert SessionItem.objects.count() == 2
        assert AgentSession.objects.get().item_count == 1
        assert Branch.objects.get().head == 1
        session.add_items([ITEM])
        assert Branch.objects.get().head == 2

    def test_somebody_else_stores_nothing(self, django_user_model: Any) -> None:
        get_session("large").sync.add_items([ITEM])
        user = django_user_model.objects.create_user("eve")
        with pytest.raises(SessionDoesNotExist):
            get_session("large", user=user).sync.add_items(self.items())
        assert SessionItem.objects.count() == 1

    def test_the_callers_transaction_holds_them(self) -> None:
        with transaction.atomic():
            get_session("large").sync.add_items(self.items())
            transaction.set_rollback(True)
        assert not SessionItem.objects.exists()


@pytest.mark.django_db(transaction=True)
class TestNothingIsCounted:
    """A batch that is refused leaves every row as it was."""

    def state(self) -> list[Any]:
        return [
            list(model.objects.order_by("pk").values())
            for model in (AgentSession, Branch, SessionItem)
        ]

    def test_for_a_branch_that_is_not_there(self) -> None:
        get_session("s").sync.add_items([ITEM])
        before = self.state()
        with pytest.raises(BranchDoesNotExist):
            get_session("s", branch="elsewhere").sync.add_items([ITEM])
        assert self.state() == before

    def test_for_somebody_else(self, django_user_model: Any) -> None:
        get_session("s").sync.add_items([ITEM])
        before = self.state()
        user = django_user_model.objects.create_user("eve")
        with pytest.raises(SessionDoesNotExist):
            get_session("s", user=user).sync.add_items([ITEM])
        assert self.state() == before

    def test_a_row_without_a_branch_gets_one_and_counts_once(self) -> None:
        AgentSession.objects.create(session_id="bare")
        get_session("bare").sync.add_items([ITEM, ITEM])
        session = AgentSession.objects.get()
        assert session.item_count == 2
        assert session.branch is not None
        assert session.branch.head == 2

    def test_a_named_branch_counts_once(self) -> None:
        get_session("s").sync.add_items([ITEM])
        Branch.objects.create(session=AgentSession.objects.get(), name="other")
        get_session("s", branch="other").sync.add_items([ITEM, ITEM])
        assert AgentSession.objects.get().item_count == 3
        assert dict(Branch.objects.values_list("name", "head")) == {
            "main": 1,
            "other": 2,
        }


@pytest.mark.django_db(transaction=True)
class TestPlans:
    """PostgreSQL alone shows a window that is read by reading everything."""

    __test__ = DATABASE_KIND == "postgres"
    items = 20_000

    @pytest.fixture(autouse=True)
    def _histories(self) -> None:
        backend = default_backend()
        backend.append(SessionKey("long"), messages(self.items))
        for number in range(200):
            backend.append(SessionKey(f"short-{number}"), [ITEM])
        with connection.cursor() as cursor:
            cursor.execute("VACUUM (ANALYZE)")

    def window(self, key: SessionKey, limit: int | None) -> dict[str, Any]:
        statements_ = default_backend().engine.statements
        own = connections["default"]
        return plan(lambda: statements_.rows(own, statements_.latest(key, limit)))

    @pytest.mark.parametrize("branch", [None, "main"])
    def test_the_window_is_read_through_its_index(self, branch: str | None) -> None:
        tree = self.window(SessionKey("long", branch=branch), 50)
        found = {node["Node Type"] for node in nodes(tree)}
        assert "Sort" not in found
        scan = next(
            node
            for node in nodes(tree)
            if node.get("Index Name") == "agent_sessions_unique_position"
        )
        assert scan["Node Type"] == "Index Scan"
        assert scan["Scan Direction"] == "Backward"
        assert scan["Actual Rows"] == 50
        assert scan.get("Rows Removed by Filter", 0) == 0

    def test_the_window_costs_the_same_at_any_length(self) -> None:
        buffers = self.window(SessionKey("long"), 50)["Shared Hit Blocks"]
        assert buffers <= 30
        reads = self.window(SessionKey("long"), 50).get("Shared Read Blocks", 0)
        assert reads <= 30

    @pytest.mark.parametrize(
        "is_held", [False, True], ids=["alone", "in a transaction"]
    )
    @pytest.mark.parametrize("count", [400, 3_000])
    def test_a_cleared_history_costs_nothing_beside_an_old_transaction(
        self, count: int, is_held: bool
    ) -> None:
        key, backend = SessionKey("cleared"), default_backend()
        backend.append(key, messages(count))
        old = connections["default"].copy()
        try:
            with old.cursor() as cursor:
                # Until it ends, no deleted row can be told to be gone.
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT count(*) FROM agent_sessions_sessionitem")
                with transaction.atomic() if is_held else nullcontext():
                    backend.clear(key)
                backend.append(key, [ITEM])
                assert len(backend.latest(key, 50)) == 1
                assert self.window(key, 50)["Shared Hit Blocks"] <= 100
        finally:
            old.close()

    def test_no_statement_of_an_append_reads_the_history(self) -> None:
        statements_ = default_backend().engine.statements
        key, batch, now = SessionKey("long"), encode_batch([ITEM, ITEM]), timezone.now()
        own = connections["default"]
        tree = plan(lambda: statements_.append(own, key, batch, now))
        scanned = [
            node
            for node in nodes(tree)
            if node["Node Type"].endswith("Scan")
            and node.get("Relation Name") == SessionItem._meta.db_table
        ]
        assert scanned == []
        assert tree["Shared Hit Blocks"] <= 100

    def test_only_long_items_are_compressed_and_by_lz4(self) -> None:
        for size in (3_000, 9_000):
            text = ("words " * size)[:size]
            default_backend().append(SessionKey("text"), [{"content": text}])
        compression = Func(F("data"), function="pg_column_compression")
        long = SessionItem.objects.filter(size__gt=2_500).order_by("size")
        assert [*long.values_list(compression, flat=True)] == [None, "lz4"]

    def test_items_that_cannot_be_compressed_stay_with_their_rows(self) -> None:
        text = "".join(random.Random(1).choices(string.printable, k=2_700))  # noqa: S311
        default_backend().append(SessionKey("noise"), [{"content": text}])
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_relation_size(reltoastrelid) FROM pg_class "
                "WHERE oid = %s::regclass",
                [SessionItem._meta.db_table],
            )
            assert cursor.fetchone() == (0,)

    def test_no_row_that_an_append_writes_has_checks(self) -> None:
        tables = [m._meta.db_table for m in (AgentSession, Branch, SessionItem)]
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT conname FROM pg_constraint JOIN pg_class "
                "ON pg_class.oid = conrelid WHERE contype = 'c' AND relname = ANY (%s)",
                [tables],
            )
            assert cursor.fetchall() == []

    def test_counting_an_append_keeps_the_index_entries(self) -> None:
        # HOT: PostgreSQL needn't touch the session's indexes when only counters and
        # times change.
        session = get_session("hot").sync
        session.add_items([ITEM])
        before = updates()
        for _ in range(20):
            session.add_items([ITEM])
        for table, (updated, hot) in updates().items():
            assert updated - before[table][0] == 20
            # A page that is full makes room once in a while.
            assert hot - before[table][1] >= 15


def updates() -> dict[str, tuple[int, int]]:
    """Return how many rows of a table were updated, and how many of them cheaply."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute(
            "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
            "WHERE relname IN (%s, %s)",
            [AgentSession._meta.db_table, Branch._meta.db_table],
        )
        return {table: (updated, hot) for table, updated, hot in cursor.fetchall()}
