"""Short reads from SQLite, which the event loop does itself."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.db.models.expressions import RawSQL
from django.test.utils import override_settings

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.transport import sqlite as transport
from agent_sessions.exceptions import SessionDoesNotExist, StorageError
from agent_sessions.models import SessionItem

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


@pytest.fixture(autouse=True)
def _fresh_threads() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


@pytest.fixture
def session() -> Any:
    made: Any = DjangoSession("s")
    made.sync.add_items(said("first", "second"))
    return made


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test as a server runs a consumer: no synchronous caller waits for it."""

    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def said(*texts: Any) -> list[Any]:
    return [{"role": "user", "content": text} for text in texts]


def contents(items: list[Any]) -> list[Any]:
    return [item["content"] for item in items]


def backend() -> DatabaseBackend:
    found = sessions["default"]
    assert isinstance(found, DatabaseBackend)
    return found


async def reader(read: Callable[[], Any]) -> tuple[Any, str]:
    """Await what reads; give its outcome, and whether the loop or a thread has read."""
    readers: list[str] = []
    loop = threading.get_ident()

    def note(statement: str) -> None:
        if statement.startswith("SELECT CAST(data"):
            here = threading.get_ident() == loop
            readers.append("loop" if here else "thread")

    def watch(trace: Any) -> None:
        with connections["default"].cursor() as cursor:
            cursor.db.connection.set_trace_callback(trace)

    await backend().threads.run(watch, note)
    try:
        outcome = await read()
    finally:
        await backend().threads.run(watch, None)
    # Where both have read, the last one's outcome counts.
    return outcome, readers[-1]


# -- who reads ---------------------------------------------------------------------------


@in_a_loop
async def test_the_loop_reads_what_is_short(session: Any) -> None:
    items, who = await reader(session.get_items)
    assert (items, who) == (said("first", "second"), "loop")


@in_a_loop
async def test_a_new_object_of_the_session_needs_no_thread_either(session: Any) -> None:
    await session.get_items()
    assert (await reader(DjangoSession("s").get_items))[1] == "loop"


@in_a_loop
async def test_nor_does_a_run_of_its_own_lease(session: Any) -> None:
    await session.fenced(1).get_items()
    assert (await reader(session.fenced(2).get_items))[1] == "loop"


@in_a_loop
async def test_it_sees_what_was_written_since(session: Any) -> None:
    await session.get_items()
    await session.add_items(said("third"))
    items, who = await reader(lambda: session.get_items(limit=2))
    assert (contents(items), who) == (["second", "third"], "loop")
    await backend().threads.run(session.sync.add_items, said("fourth"))
    items, who = await reader(lambda: session.get_items(limit=2))
    assert (contents(items), who) == (["third", "fourth"], "loop")
    await session.clear_session()
    assert await session.get_items() == []


@in_a_loop
async def test_across_a_fork_it_reads_the_ancestors_too(session: Any) -> None:
    await session.fork(2, "other")
    await session.add_items(said("on the branch"))
    everything = contents(await session.get_items(limit=9))
    items, who = await reader(lambda: session.get_items(limit=9))
    assert (contents(items), who) == (everything, "loop")
    assert everything[-1] == "on the branch"
    assert len(everything) > 1


@in_a_loop
async def test_a_long_history_is_read_by_a_thread() -> None:
    session: Any = DjangoSession("long")
    await session.add_items(said(*range(transport.ROWS + 1)))
    for _ in range(2):
        items, who = await reader(session.get_items)
        assert (len(items), who) == (transport.ROWS + 1, "thread")


@in_a_loop
async def test_so_is_one_of_large_items() -> None:
    session: Any = DjangoSession("large")
    await session.add_items(said("x" * transport.CHARACTERS))
    for _ in range(2):
        assert (await reader(session.get_items))[1] == "thread"


@in_a_loop
async def test_so_is_one_that_has_grown_meanwhile(session: Any) -> None:
    await session.get_items()
    more = range(transport.ROWS)
    await backend().threads.run(session.sync.add_items, said(*more))
    for _ in range(2):
        items, who = await reader(session.get_items)
        assert (contents(items), who) == (["first", "second", *more], "thread")


@in_a_loop
async def test_the_window_of_a_long_history_is_short(session: Any) -> None:
    await session.add_items(said(*range(500)))
    await session.get_items(limit=10)
    items, who = await reader(lambda: session.get_items(limit=10))
    assert (contents(items), who) == (list(range(490, 500)), "loop")


@in_a_loop
async def test_unreadable_rows_make_a_read_look_further_back(session: Any) -> None:
    await session.get_items()
    rows = SessionItem.objects.filter(position=2)
    await backend().threads.run(rows.update, data="not JSON")
    items, who = await reader(lambda: session.get_items(limit=1))
    assert (contents(items), who) == (["first"], "loop")


@in_a_loop
async def test_bytes_that_are_no_text_hide_no_readable_rows(session: Any) -> None:
    rows = SessionItem.objects.filter(position=2)
    # sqlite3 refuses to read such a column as text, and the other rows with it.
    broken = RawSQL("CAST(X'7BFF7D' AS TEXT)", ())
    await backend().threads.run(rows.update, data=broken)
    items, by = await reader(session.get_items)
    assert (contents(items), by) == (["first"], "loop")


@in_a_loop
async def test_while_the_thread_is_at_work_the_read_waits_for_it(session: Any) -> None:
    await session.get_items()
    begun, free = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        free.wait(10)

    busy = asyncio.ensure_future(backend().threads.run(work))
    await asyncio.to_thread(begun.wait, 10)
    reading = asyncio.ensure_future(session.get_items())
    await asyncio.sleep(0.05)
    assert not reading.done()
    free.set()
    assert await reading == said("first", "second")
    await busy


# -- whose -------------------------------------------------------------------------------


def test_knowing_one_owners_session_opens_it_to_nobody_else(
    django_user_model: Any,
) -> None:
    owner = django_user_model.objects.create(username="owner")
    other = django_user_model.objects.create(username="other")
    mine: Any = DjangoSession("owned", user=owner)

    async def read() -> None:
        await mine.add_items(said("secret"))
        await mine.get_items()
        assert (await reader(mine.get_items))[1] == "loop"
        for user in (other, None):
            with pytest.raises(SessionDoesNotExist):
                await DjangoSession("owned", user=user).get_items()

    asyncio.run(read())


@in_a_loop
async def test_turns_at_once_are_read_in_the_loop_and_share_a_commit() -> None:
    opened = [DjangoSession(f"s{number}") for number in range(8)]
    loop = threading.get_ident()
    statements: list[tuple[str, bool]] = []

    async def turn(session: Any) -> None:
        await session.get_items(limit=50)
        await session.add_items(said("next"))

    def watch(trace: Any) -> None:
        with connections["default"].cursor() as cursor:
            cursor.db.connection.set_trace_callback(trace)

    def note(statement: str) -> None:
        statements.append((statement.split("(")[0], threading.get_ident() == loop))

    await asyncio.gather(*map(turn, opened))
    await asyncio.gather(*map(turn, opened))
    await backend().threads.run(watch, note)
    await asyncio.gather(*map(turn, opened))
    await backend().threads.run(watch, None)
    assert statements.count(("SELECT CAST", True)) == 8
    assert statements.count(("COMMIT", False)) == 1


# -- where a thread has to ---------------------------------------------------------------


@in_a_loop
async def test_who_watches_statements_sees_them_in_a_thread(session: Any) -> None:
    await session.get_items()
    with override_settings(DEBUG=True):
        assert (await reader(session.get_items))[1] == "thread"
    assert (await reader(session.get_items))[1] == "loop"


@in_a_loop
async def test_what_is_wrong_is_told_by_a_thread(session: Any) -> None:
    await session.get_items()
    table = SessionItem._meta.db_table
    with renamed(table), pytest.raises(StorageError, match="OperationalError"):
        await session.get_items()
    assert await session.get_items() == said("first", "second")


@contextmanager
def renamed(table: str) -> Iterator[None]:
    other = sqlite3.connect(connection.settings_dict["NAME"])
    other.execute(f"ALTER TABLE {table} RENAME TO elsewhere")
    try:
        yield
    finally:
        other.execute(f"ALTER TABLE elsewhere RENAME TO {table}")
        other.close()


@in_a_loop
async def test_a_connection_that_was_closed_is_made_anew_by_a_thread(
    session: Any,
) -> None:
    await session.get_items()
    await backend().threads.run(lambda: connections["default"].close())
    assert await session.get_items() == said("first", "second")


ALONE = """
import asyncio, os, sys, threading
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": sys.argv[1],
        "OPTIONS": {"init_command": f"PRAGMA journal_mode={sys.argv[2]}"},
    }},
    INSTALLED_APPS=[
        "django.contrib.auth", "django.contrib.contenttypes", "agent_sessions"
    ],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
)
django.setup()
from django.core.management import call_command
from django.db import connections
call_command("migrate", verbosity=0)
from agent_sessions import DjangoSession, sessions

session = DjangoSession("s")
item = {"role": "user", "content": "Hello"}
readers = []

def note(statement):
    if statement.startswith("SELECT CAST(data"):
        readers.append(threading.current_thread() is threading.main_thread())

def watch():
    with connections["default"].cursor() as cursor:
        cursor.db.connection.set_trace_callback(note)

async def read():
    assert await session.get_items() == [item]

async def main():
    await session.add_items([item])
    await session.backend.threads.run(watch)
    await read()
    await read()

async def again():
    # The fork has closed the connection, with who watched it.
    await session.backend.threads.run(watch)
    await read()

asyncio.run(main())
print(readers)
connections.close_all()
if sys.argv[3:] == ["fork"]:
    child = os.fork()
    if not child:
        readers.clear()
        asyncio.run(read())
        assert readers == [], readers
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    readers.clear()
    asyncio.run(again())
    assert readers == [True], readers
sessions.reset()
"""


def alone(path: Path, *arguments: str) -> str:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads, which is the point.
        [
            *(sys.executable, "-W", "ignore::DeprecationWarning"),
            *("-c", ALONE, str(path), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={key: value for key, value in os.environ.items() if "DJANGO" not in key},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_wal_a_read_could_wait_for_a_writer(tmp_path: Path) -> None:
    assert alone(tmp_path / "a.sqlite3", "DELETE") == "[False, False]"


def test_a_forked_process_leaves_its_parents_connection_alone(tmp_path: Path) -> None:
    assert alone(tmp_path / "a.sqlite3", "WAL", "fork") == "[True, True]"
