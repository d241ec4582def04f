"""Connections to the database that a forked child inherits, or that a thread leaves."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
from django.db import connections

from agent_sessions import get_session, sessions
from tests.settings import DATABASE_KIND

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
]

ITEM: Any = {"role": "user", "content": "Hello"}


def run(source: str, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads, which is the point.
        [
            *(sys.executable, "-W", "ignore::DeprecationWarning"),
            *("-c", source, *arguments),
        ],
        env=environment | {"OPENAI_AGENTS_DISABLE_TRACING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.strip()


# What a child lets go of is let go of at some time: now, or when it ends as Python does.
SERVERS = """
import asyncio, gc, os, queue, sys, threading
import django
from django.conf import settings

# With more, each call may run on another connection.
store = "agent_sessions.backends.database.DatabaseBackend"
settings.AGENT_SESSIONS = {"default": {"BACKEND": store, "OPTIONS": {"threads": 1}}}
django.setup()
from django.db import connections
from agent_sessions import get_session, sessions

item = {"role": "user", "content": "Hello"}

def name():
    # As the server names the connection of the thread that asks.
    with connections["default"].cursor() as cursor:
        cursor.execute(sys.argv[1])
        return cursor.fetchone()[0]

def in_the_pool():
    async def main():
        await get_session("pool").add_items([item])
        return await sessions["default"].threads.run(name)
    return asyncio.run(main())

def in_a_thread():
    get_session("thread").sync.add_items([item])
    return name()

asked, answers = queue.SimpleQueue(), queue.SimpleQueue()

def serve():
    while asked.get():
        try:
            answers.put(in_a_thread())
        except Exception as exc:
            answers.put(exc)

def names():
    asked.put(True)
    return answers.get(timeout=60), in_the_pool()

def child(works, ends):
    if works:
        in_the_pool()
        in_a_thread()
    if not ends:
        gc.collect()
        os._exit(0)
    sys.exit(0)

thread = threading.Thread(target=serve, daemon=True)
thread.start()
before = names()
for works, ends in (False, False), (True, False), (False, True), (True, True):
    connections.close_all()
    forked = os.fork()
    if not forked:
        child(works, ends)
    assert os.waitpid(forked, 0)[1] == 0
    assert names() == before, (works, ends, before)
asked.put(False)
thread.join()
sessions.reset()
"""
NAMED_BY = {"postgres": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()"}


@pytest.mark.skipif(DATABASE_KIND not in NAMED_BY, reason="SQLite has no server")
def test_a_child_ends_no_connection_of_its_parent(
    database_environment: dict[str, str],
) -> None:
    run(SERVERS, database_environment, NAMED_BY[DATABASE_KIND])


# The child writes, the parent closes what it has, as the last who has the file open, if
# the child is not known to have; then the child writes again.
SQLITE = """
import asyncio, os
import django
django.setup()
from django.core.management import call_command
from django.db import connections
from agent_sessions import get_session, sessions

call_command("migrate", verbosity=0)

def add(text):
    asyncio.run(get_session("s").add_items([{"role": "user", "content": text}]))

add("parent")
connections.close_all()
(heard, tell), (asked, ask) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    add("child")
    os.write(tell, b".")
    os.read(asked, 1)
    add("late child")
    os._exit(0)
os.read(heard, 1)
sessions.reset()
os.write(ask, b".")
assert os.waitpid(child, 0)[1] == 0
print([item["content"] for item in get_session("s").sync.get_items()])
"""


@pytest.mark.one_database
def test_a_child_of_sqlite_has_locks_of_its_own(tmp_path: Path) -> None:
    environment = os.environ | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "AGENT_SESSIONS_TEST_DATABASE": "sqlite",
        "AGENT_SESSIONS_TEST_NAME": str(tmp_path / "forked.sqlite3"),
    }
    assert run(SQLITE, environment) == "['parent', 'child', 'late child']"


@pytest.mark.django_db(transaction=True)
def test_a_connection_goes_with_its_thread() -> None:
    """What a backend keeps for its statements keeps no connection."""
    sessions.reset()
    found: list[weakref.ref[Any]] = []

    def work() -> None:
        get_session("gone").sync.add_items([ITEM])
        found.append(weakref.ref(connections["default"]))
        connections.close_all()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert found[0]() is None


@pytest.mark.skipif(DATABASE_KIND not in NAMED_BY, reason="SQLite has no server")
@pytest.mark.django_db(transaction=True)
def test_what_is_used_after_it_was_closed_leaves_no_connection() -> None:
    """As a task may that outlives changed settings; a suite's database is dropped."""

    def connect() -> Any:
        connections["default"].ensure_connection()
        return connections["default"].connection

    threads, default = sessions["default"].threads, cast("Any", connections["default"])
    sessions.reset()
    driver = asyncio.run(threads.run(connect))
    driver.cursor().execute("SELECT 1")
    del threads
    gc.collect()
    with pytest.raises(default.Database.Error):
        driver.cursor().execute("SELECT 1")
