"""Appends that wait for SQLite's one writer share a transaction."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import DjangoSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.transport.sqlite import Append, append_together
from agent_sessions.concurrency.batching import Gathering
from agent_sessions.exceptions import (
    BranchDoesNotExist,
    InvalidItem,
    LeaseLost,
    SessionDoesNotExist,
    StorageError,
    StoreUnavailable,
)
from agent_sessions.items import TEXT_LENGTH
from agent_sessions.models import AgentSession, SessionItem

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


@pytest.fixture(autouse=True)
def _fresh_threads() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def said(*texts: Any) -> list[Any]:
    return [{"role": "user", "content": text} for text in texts]


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


def stored(session_id: str) -> list[Any]:
    items: list[Any] = DjangoSession(session_id).sync.get_items()
    return [item["content"] for item in items]


def filled(*session_ids: str) -> None:
    for session_id in session_ids:
        DjangoSession(session_id).sync.add_items(said("first"))


def count(queries: CaptureQueriesContext, statement: str) -> int:
    return sum(query["sql"].startswith(statement) for query in queries.captured_queries)


async def together(*appends: tuple[str, list[Any]]) -> tuple[list[Any], list[str]]:
    """Append at the same time, behind a busy thread; give outcomes and statements."""
    free = threading.Event()
    statements: list[str] = []

    def wait() -> None:
        with connections["default"].cursor() as cursor:
            cursor.db.connection.set_trace_callback(statements.append)
        assert free.wait(10)

    busy = asyncio.ensure_future(backend().threads.run(wait))
    waiting = [
        asyncio.ensure_future(get_session(session_id).add_items(items))
        for session_id, items in appends
    ]
    await asyncio.sleep(0.05)
    free.set()
    await busy
    return await asyncio.gather(*waiting, return_exceptions=True), statements


# -- what waits goes together ------------------------------------------------------------


def test_those_that_wait_share_a_transaction() -> None:
    names = [f"s{number}" for number in range(20)]
    filled(*names)
    appends = [(name, said(f"{name} says", f"{name} ends")) for name in names]
    outcomes, statements = asyncio.run(together(*appends))
    assert outcomes == [None] * 20
    assert statements.count("COMMIT") == 1
    for name in names:
        assert stored(name) == ["first", f"{name} says", f"{name} ends"]


def test_a_session_keeps_the_order_of_its_batches() -> None:
    outcomes, _ = asyncio.run(together(*(("s", said(n)) for n in range(30))))
    assert outcomes == [None] * 30
    assert stored("s") == list(range(30))


def test_new_sessions_among_them_begin() -> None:
    filled("old")
    outcomes, _ = asyncio.run(together(("new", said(1)), ("old", said(2))))
    assert outcomes == [None, None]
    assert (stored("new"), stored("old")) == ([1], ["first", 2])


def test_a_long_batch_is_no_burden_to_the_others() -> None:
    filled("a", "b", "c")
    outcomes, statements = asyncio.run(
        together(("a", said(1)), ("b", said(*range(500))), ("c", said(2)))
    )
    assert outcomes == [None] * 3
    assert statements.count("COMMIT") == 3
    assert [len(stored(name)) for name in "abc"] == [2, 501, 2]


def test_a_long_batch_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    statements = backend().engine.statements
    encode = statements.batch

    def count_items(items: Any) -> Any:
        encoded.append(len(items))
        return encode(items)

    monkeypatch.setattr(statements, "batch", count_items)
    filled("old")
    encoded.clear()
    # A session that is new finds no place at first.
    outcomes, _ = asyncio.run(
        together(("new", said(*range(500))), ("old", said(*range(300))))
    )
    assert outcomes == [None, None]
    assert sorted(encoded) == [300, 500]


# -- each fails by itself ----------------------------------------------------------------


def test_what_is_wrong_with_one_is_told_to_that_one() -> None:
    filled("a", "b")
    outcomes, _ = asyncio.run(
        together(("a", said(1)), ("b", said(float("nan"))), ("b", said(2)))
    )
    assert outcomes[0] is None
    assert isinstance(outcomes[1], InvalidItem)
    assert outcomes[2] is None
    assert (stored("a"), stored("b")) == (["first", 1], ["first", 2])


def test_no_place_for_one_is_no_matter_to_the_others(django_user_model: Any) -> None:
    owner = django_user_model.objects.create_user("owner")
    DjangoSession("theirs", user=owner).sync.add_items(said("secret"))
    filled("a", "b", "c")
    appends = [
        Append(SessionKey("a", None), said(1)),
        Append(SessionKey("theirs", None), said(2)),
        Append(SessionKey("b", None, branch="none"), said(3)),
        Append(SessionKey("c", None, fence=7), said(4)),
        Append(SessionKey("c", None), said(5)),
    ]
    errors = append_together(backend().engine, appends)
    assert [type(error) for error in errors] == [
        type(None),
        SessionDoesNotExist,
        BranchDoesNotExist,
        LeaseLost,
        type(None),
    ]
    assert stored("a") == ["first", 1]
    assert stored("c") == ["first", 5]
    assert AgentSession.objects.get(session_id="theirs").item_count == 1


def test_one_that_the_database_refuses_spoils_nothing() -> None:
    filled("a", "b", "c")
    branch = AgentSession.objects.get(session_id="b").branch
    # The position that the next batch of b takes isn't free.
    assert branch is not None
    SessionItem.objects.create(branch=branch, position=2, data="{}", size=2)
    appends = [Append(SessionKey(name, None), said(name)) for name in "abc"]
    errors = append_together(backend().engine, appends)
    assert [type(error) for error in errors] == [type(None), StorageError, type(None)]
    assert (stored("a"), stored("c")) == (["first", "a"], ["first", "c"])
    assert AgentSession.objects.get(session_id="b").item_count == 1
    assert not connection.in_atomic_block


def test_a_locked_database_is_told_to_all_and_waited_for_once() -> None:
    filled("a", "b")
    path = connection.settings_dict["NAME"]
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA busy_timeout = 50")
    with locked(path), CaptureQueriesContext(connection) as queries:
        errors = append_together(
            backend().engine,
            [Append(SessionKey(name, None), said(name)) for name in "ab"],
        )
    assert [type(error) for error in errors] == [StoreUnavailable, StoreUnavailable]
    assert count(queries, "BEGIN") == 1
    assert (stored("a"), stored("b")) == (["first"], ["first"])
    connection.close()


@contextmanager
def locked(path: str) -> Iterator[None]:
    other = sqlite3.connect(path, uri=path.startswith("file:"))
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
    finally:
        other.close()


def test_in_a_transaction_each_goes_into_it() -> None:
    from django.db import transaction

    with transaction.atomic():
        errors = append_together(
            backend().engine,
            [Append(SessionKey(name, None), said(name)) for name in "ab"],
        )
        assert errors == [None, None]
        assert stored("a") == ["a"]
        transaction.set_rollback(True)
    assert not AgentSession.objects.exists()


async def test_what_goes_wrong_before_the_work_leaves_nobody_waiting() -> None:
    worked: list[Any] = []

    def work(arguments: Any) -> list[None]:
        worked.extend(arguments)
        return [None] * len(arguments)

    def refuse(call: Any) -> Any:
        raise DatabaseError("no connection")

    gathering = Gathering(work)
    pool = ThreadPoolExecutor(1)

    def spawn(call: Any) -> None:
        pool.submit(lambda: call()())

    lost = [gathering.join(number, spawn, refuse) for number in range(3)]
    outcomes = await asyncio.gather(*lost, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DatabaseError] * 3
    await gathering.join(3, spawn, lambda call: call())
    assert worked == [3]
    pool.shutdown()
    with pytest.raises(RuntimeError):
        await gathering.join(4, spawn, lambda call: call())


def test_a_cancelled_caller_learns_the_outcome_and_stops_nobody() -> None:
    filled("a", "b")

    async def main() -> list[Any]:
        free = threading.Event()
        busy = asyncio.ensure_future(backend().threads.run(free.wait, 10))
        first, second = (
            asyncio.ensure_future(get_session(name).add_items(said("mine")))
            for name in "ab"
        )
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.sleep(0.02)
        assert not first.done()
        free.set()
        await busy
        return list(await asyncio.gather(first, second, return_exceptions=True))

    cancelled, done = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert done is None
    assert stored("a") == stored("b") == ["first", "mine"]


def test_loops_of_several_threads_are_each_told() -> None:
    filled("a", "b", "c", "d")
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    async def talk(name: str) -> None:
        for number in range(20):
            await get_session(name).add_items(said(number))

    def run(name: str) -> None:
        try:
            barrier.wait(10)
            asyncio.run(asyncio.wait_for(talk(name), 30))
        except BaseException as exc:
            errors.append(exc)
        finally:
            connections.close_all()

    running = [threading.Thread(target=run, args=[name]) for name in "abcd"]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors
    for name in "abcd":
        assert stored(name) == ["first", *range(20)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_waits_for_nothing_of_its_parents(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, sys, threading
import django
from django.conf import settings
settings.configure(
    SECRET_KEY="x", USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth",
                    "agent_sessions"],
    DATABASES={{"default": {{
        "ENGINE": "django.db.backends.sqlite3", "NAME": {str(tmp_path / "db")!r},
        "OPTIONS": {{"transaction_mode": "IMMEDIATE", "timeout": 20,
                     "init_command": "PRAGMA journal_mode=WAL"}}}}}},
)
django.setup()
from django.core.management import call_command
from django.db import connections
call_command("migrate", verbosity=0)
connections.close_all()
from agent_sessions import get_session, sessions

def add(text):
    return get_session("s").add_items([{{"role": "user", "content": text}}])

async def main():
    free = threading.Event()
    busy = asyncio.ensure_future(sessions["default"].threads.run(free.wait, 2))
    waiting = asyncio.ensure_future(add("parent"))
    await asyncio.sleep(0.05)
    child = os.fork()
    if child == 0:
        return
    await asyncio.to_thread(os.waitpid, child, 0)
    free.set()
    await asyncio.gather(busy, waiting)
    items = await get_session("s").get_items()
    print([item["content"] for item in items])

async def of_the_child():
    await asyncio.wait_for(add("child"), 10)

pid = os.getpid()
loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(main())
finally:
    if os.getpid() != pid:
        asyncio.events._set_running_loop(None)
        asyncio.new_event_loop().run_until_complete(of_the_child())
        os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # The fork waited for what was under way, and the child for nothing.
    assert done.stdout.strip() == "['parent', 'child']"


# -- what an append writes ---------------------------------------------------------------


def test_a_day_is_written_once() -> None:
    """SQLite writes the indexes of every column that an UPDATE names."""
    filled("s")
    with CaptureQueriesContext(connection) as queries:
        DjangoSession("s").sync.add_items(said("again"))
    assert not any("SET active_on" in q["sql"] for q in queries.captured_queries)
    written = [q["sql"].split("RETURNING")[0] for q in queries.captured_queries]
    assert not any(", active_on =" in sql for sql in written)
    yesterday = timezone.now().date() - timedelta(days=1)
    AgentSession.objects.update(active_on=yesterday)
    DjangoSession("s").sync.add_items(said("next day"))
    assert AgentSession.objects.get().active_on == timezone.now().date()
    asyncio.run(together(("s", said("together")), ("s", said("as well"))))
    assert AgentSession.objects.get().active_on == timezone.now().date()


def test_the_beginning_of_a_text_is_a_column() -> None:
    DjangoSession("s").sync.add_items(said("short", "x" * 5_000))
    texts = SessionItem.objects.order_by("position").values_list("text", flat=True)
    assert list(texts) == ["short", "x" * TEXT_LENGTH]
    assert stored("s") == ["short", "x" * 5_000]
