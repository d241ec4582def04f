"""Plans that PostgreSQL makes and keeps while its tables fill a page or two.

It prefers to read such tables whole, and a kept plan does so until the next ANALYZE,
however long they are by then. Each statement of a turn and of a run's start is executed
until its plan is kept, then the tables grow, and what it reads is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from django.db import connection, connections
from django.test.utils import override_settings
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.agui.events import OpenRun
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.run_rows import newest
from agent_sessions.concurrency.connections import transact, unprepared
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    RunEvents,
    SessionItem,
)
from agent_sessions.runs import event_rows, heartbeat, records, sync, watching
from agent_sessions.runs.setup import Conversation, RunLimits
from agent_sessions.usage import Spent
from tests.settings import DATABASE_KIND

pytestmark = pytest.mark.django_db(transaction=True)
__test__ = DATABASE_KIND == "postgres"

# What a window of 50 may read at most.
ROWS, BUFFERS = 200, 100
MORE_BUFFERS = 300
# PostgreSQL keeps a generic plan after five executions.
KEPT = 8
# Enough for each table to have more pages than may be read.
SESSIONS, ITEMS = 6_000, 6
ITEM: Any = {"role": "user", "content": "Hello"}
NAMED = "other"

_TABLES = [
    model._meta.db_table
    for model in (AgentSession, Branch, SessionItem, AgentRun, RunEvents)
]
_GROW = (
    "INSERT INTO {0} SELECT (jsonb_populate_record(s, jsonb_build_object("
    "'id', 1000000 + n, 'session_id', 'grown-' || n, 'branch_id', NULL))).* "
    "FROM {0} s, generate_series(1, {sessions}) n WHERE s.session_id = 'empty'",
    "INSERT INTO {1} SELECT (jsonb_populate_record(b, jsonb_build_object("
    "'id', 1000000 + n, 'session_id', 1000000 + n, 'head', {items}))).* "
    "FROM {1} b, generate_series(1, {sessions}) n "
    "WHERE b.session_id = (SELECT id FROM {0} WHERE session_id = 'empty')",
    "UPDATE {0} SET branch_id = id WHERE session_id LIKE 'grown-%'",
    "INSERT INTO {2} (branch_id, position, turn, data, type, role, call_id, tool_name, "
    "text, size, created_at) SELECT 1000000 + n, p, p, repeat('x', 100), 'message', "
    "'user', '', '', repeat('x', 100), 100, now() "
    "FROM generate_series(1, {sessions}) n, generate_series(1, {items}) p",
    "INSERT INTO {3} SELECT (jsonb_populate_record(r, jsonb_build_object("
    "'id', 1000000 + n, 'session_id', 1000000 + n, 'run_id', 'grown-' || n, "
    "'branch_id', 1000000 + n))).* FROM {3} r, generate_series(1, {sessions}) n "
    "WHERE r.run_id = 'first'",
    # One session has many runs, and each run has told something.
    "INSERT INTO {3} SELECT (jsonb_populate_record(r, jsonb_build_object("
    "'id', 2000000 + n, 'session_id', 1000555, 'run_id', 'long-' || n, "
    "'branch_id', 1000555))).* FROM {3} r, generate_series(1, {sessions}) n "
    "WHERE r.run_id = 'first'",
    "INSERT INTO {4} (run_id, first, last, body, written_at) "
    "SELECT id, 1, 9, 'sealed', now() FROM {3} WHERE id > 1000000",
)


class Cost(NamedTuple):
    """What a call has read of the app's tables, in rows and in pages."""

    rows: int
    buffers: int


Call = Callable[[DatabaseBackend, str], Any]


def _run(backend: DatabaseBackend, name: str, run_id: str = "") -> None:
    """Begin a run, keep its lease, and end it."""
    key = SessionKey(name)
    with unprepared(connections["default"]):
        pk = backend.directory.rows(key).values_list("pk", flat=True).get()
    conversation = Conversation(pk, backend, key)
    lease = records.begin(
        conversation, run_id or uuid4().hex, model="", limits=RunLimits()
    )
    assert lease is not None
    assert all(heartbeat.beat(conversation.using, [(conversation, lease)]))
    records.finish(conversation, lease, records.Outcome("completed", Spent()))


def _tell(backend: DatabaseBackend, name: str) -> None:
    """Look at a run, write and read what it has told, and remove that."""
    key = SessionKey(name)
    pk = backend.directory.rows(key).values_list("pk", flat=True).get()
    conversation = Conversation(pk, backend, key)
    using, run = conversation.using, newest(conversation.using, pk).first()
    assert run is not None
    transact(using, lambda: event_rows.hold(using, [pk]))
    run_rows.add_events(using, [RunEvents(run=run, first=10, last=11, body="sealed")])
    watching.look(using, [pk], timedelta(minutes=1), [pk])
    for run_id in (run.run_id, "nobody's"):
        within = OpenRun()
        within.run_id = run_id
        sync.look(conversation, 60, within, is_local=False)
    sync.read_on(conversation, run.pk, 10)
    run_rows.remove_events(using, pk, run.pk, timezone.now())
    run_rows.remove_old_events(using)
    assert not RunEvents.objects.filter(run=run).exists()


CALLS: dict[str, Call] = {
    "window": lambda backend, name: backend.latest(SessionKey(name), 50),
    "window of a named branch": lambda backend, name: backend.latest(
        SessionKey(name, branch="main"), 50
    ),
    "window of a fork": lambda backend, name: backend.latest(
        SessionKey("forked", branch=NAMED), 50
    ),
    "append": lambda backend, name: backend.append(SessionKey(name), [ITEM, ITEM]),
    "append under a lease": lambda backend, name: backend.append(
        SessionKey(name, fence=0), [ITEM]
    ),
    "append to a named branch": lambda backend, name: backend.append(
        SessionKey(name, branch="main"), [ITEM]
    ),
    "pop": lambda backend, name: backend.pop(SessionKey(name)),
    "page": lambda backend, name: backend.page(SessionKey(name), limit=50),
}
# Of several statements each, which read more pages.
LONGER: dict[str, Call] = {
    "first append": lambda backend, name: backend.append(
        SessionKey(uuid4().hex), [ITEM]
    ),
    "branches": lambda backend, name: backend.ask(
        SessionKey(name), lambda branches: branches.listing()
    ),
    "clear": lambda backend, name: backend.clear(SessionKey(name)),
    "run": _run,
}
# These are made by threads alone.
TOLD: dict[str, Call] = {"what a run tells": _tell}
ALL = CALLS | LONGER | TOLD


def _by_loop(call: str) -> Callable[[DatabaseBackend, str], Awaitable[Any]]:
    async def awaited(backend: DatabaseBackend, name: str) -> Any:
        key = SessionKey(name, branch="main" if "named" in call else None)
        if call.startswith("append"):
            return await backend.aappend(key, [ITEM, ITEM])
        return await backend.alatest(key, 50)

    return awaited


class _Place:
    """A kind of connection: how it makes a call, and executes a statement."""

    def __init__(self, backend: DatabaseBackend) -> None:
        self.backend = backend
        self.loop = asyncio.new_event_loop()

    def make(self, call: str, name: str) -> None:
        raise NotImplementedError

    def execute(self, statement: str) -> None:
        raise NotImplementedError

    def cost(self, call: str, name: str) -> Cost:
        before = self._read()
        self.make(call, name)
        after = self._read()
        return Cost(after.rows - before.rows, after.buffers - before.buffers)

    def _read(self) -> Cost:
        """Read the server's counters, which a connection reports when it is told to."""
        self.execute("SELECT pg_stat_force_next_flush()")
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), "
                "sum(heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit) "
                "FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid) "
                "WHERE pg_stat_user_tables.relname = ANY (%s)",
                [_TABLES],
            )
            return Cost(*map(int, cursor.fetchone()))


class _Request(_Place):
    """The caller's own connection."""

    def make(self, call: str, name: str) -> None:
        ALL[call](self.backend, name)

    def execute(self, statement: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)


class _Thread(_Place):
    """A connection of the backend's pool of threads."""

    def make(self, call: str, name: str) -> None:
        self._run(ALL[call], self.backend, name)

    def execute(self, statement: str) -> None:
        def execute() -> None:
            with connection.cursor() as cursor:
                cursor.execute(statement)

        self._run(execute)

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        self.loop.run_until_complete(self.backend.threads.run(function, *args))


class _Loop(_Place):
    """A connection that the event loop awaits."""

    def make(self, call: str, name: str) -> None:
        self.loop.run_until_complete(_by_loop(call)(self.backend, name))

    def execute(self, statement: str) -> None:
        transport: Any = self.backend.engine.transport
        for pool in transport._pools.every():
            for each in pool._idle:
                self.loop.run_until_complete(each.execute(statement))


# An append to a named branch is made in a thread.
LOOP = ("window", "window of a named branch", "append")


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return OPTIONS of the database, with which connections are made anew."""
    options = dict(connection.settings_dict.get("OPTIONS") or {})
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", options)
    sessions.reset()
    path = "agent_sessions.backends.database.DatabaseBackend"
    setting = {"default": {"BACKEND": path, "OPTIONS": {"threads": 1}}}
    with override_settings(AGENT_SESSIONS=setting):
        yield options
    sessions.reset()
    _statement(
        *(f"ALTER TABLE {table} RESET (autovacuum_enabled)" for table in _TABLES)
    )
    connection.close()


def _names(call: str) -> tuple[str, ...]:
    if call in TOLD:
        return "changed", "grown-555"
    return ("old" if call in CALLS else "changed",)


def _statement(*statements: str) -> None:
    with connection.cursor() as cursor:
        for each in statements:
            cursor.execute(each)


def _young(backend: DatabaseBackend) -> None:
    """Fill a page or two of each table, and have them analysed."""
    _statement(f"TRUNCATE {', '.join(_TABLES)} CASCADE")
    for table in _TABLES:
        _statement(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    for name in ("old", "forked", "changed"):
        backend.append(SessionKey(name), [ITEM] * 20)
    backend.directory.ensure(SessionKey("empty"))
    backend.change(
        SessionKey("forked"), lambda branches: branches.fork_before_turn(9, NAMED)
    )
    _run(backend, "changed", "first")
    _statement(f"ANALYZE {', '.join(_TABLES)}")


def _grow() -> None:
    names = {"sessions": SESSIONS, "items": ITEMS}
    _statement(*(each.format(*_TABLES, **names) for each in _GROW))
    # Else the server may count these rows seconds later, for a call.
    _statement("SELECT pg_stat_force_next_flush()")


@pytest.mark.parametrize("threshold", [None, 0], ids=["plain", "prepared"])
@pytest.mark.parametrize("kind", [_Request, _Thread, _Loop])
def test_a_plan_of_young_tables_reads_little_when_they_have_grown(
    kind: type[_Place], threshold: int | None, database: dict[str, Any]
) -> None:
    if threshold is not None:
        database |= {"prepare_threshold": threshold, "server_side_binding": True}
    connection.close()
    backend: Any = sessions["default"]
    place = kind(backend)
    calls = {
        _Loop: LOOP,
        _Request: tuple(CALLS | LONGER),
        _Thread: tuple(ALL),
    }[kind]
    _young(backend)
    # An event loop opens its connections after some calls.
    for call in (*LOOP[:1] * 20, *calls):
        for _ in range(KEPT):
            place.make(call, _names(call)[0])
    backend.append(SessionKey("old"), [ITEM] * 10)
    _grow()
    costs = {
        (call, name): place.cost(call, name)
        for call in calls
        for name in ("old" if call in CALLS else "changed", "grown-7", "grown-999")
    }
    backend.close()
    place.loop.close()
    assert sum(cost.rows for cost in costs.values()) > len(costs)
    assert [
        (call, name, cost)
        for (call, name), cost in costs.items()
        if cost.rows > ROWS
        or cost.buffers > (BUFFERS if call in CALLS else MORE_BUFFERS)
    ] == []


@pytest.mark.skipif(DATABASE_KIND != "postgres", reason="PostgreSQL's own words.")
@pytest.mark.parametrize("items", [1, 600])
def test_who_manages_transactions_plans_as_before(items: int) -> None:
    connection.set_autocommit(False)
    try:
        said: Any = [{"role": "user", "content": "Hi"}] * items
        DjangoSession("s").sync.add_items(said)
        with connection.cursor() as cursor:
            cursor.execute("SHOW enable_seqscan")
            assert cursor.fetchone() == ("on",)
    finally:
        connection.rollback()
        connection.set_autocommit(True)
