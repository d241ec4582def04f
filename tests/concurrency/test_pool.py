"""The threads of a database: how many work, what waits, and how they end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import wraps
from typing import Any

import pytest

from agent_sessions.concurrency import forks
from agent_sessions.concurrency.threads import ConnectionPolicy, DatabaseThreads

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]
PREFIX = "agent_sessions-default"


@pytest.fixture
def pool() -> Iterator[DatabaseThreads]:
    made = DatabaseThreads("default", ConnectionPolicy(size=3))
    yield made
    made.close()


def in_its_own_loop(
    test: Callable[[DatabaseThreads], Coroutine[Any, Any, None]],
) -> Callable[[DatabaseThreads], None]:
    """Make a test of a coroutine for which no synchronous caller waits."""

    @wraps(test)
    def run(pool: DatabaseThreads) -> None:
        asyncio.run(test(pool))

    return run


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.open.wait(10)
        return threading.get_ident()


async def busy(pool: DatabaseThreads, count: int) -> list[Gate]:
    """Keep threads at work. The tasks keep themselves alive: they wait for threads."""
    gates = [Gate() for _ in range(count)]
    _tasks.extend(asyncio.ensure_future(pool.run(gate)) for gate in gates)
    for gate in gates:
        await asyncio.to_thread(gate.begun.wait, 10)
    return gates


_tasks: list[asyncio.Future[int]] = []


def named(prefix: str = PREFIX) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(prefix)]


@in_its_own_loop
async def test_no_more_threads_than_allowed_and_no_fewer(pool: DatabaseThreads) -> None:
    gates = await busy(pool, 3)
    waiting = asyncio.ensure_future(pool.run(threading.get_ident))
    gates[1].open.set()
    assert await waiting != threading.get_ident()
    assert len(named()) == 3
    for gate in gates:
        gate.open.set()


@in_its_own_loop
async def test_what_waits_keeps_its_order(pool: DatabaseThreads) -> None:
    gates = await busy(pool, 3)
    seen: list[int] = []
    waiting = [
        asyncio.ensure_future(pool.run(seen.append, number)) for number in range(50)
    ]
    gates[0].open.set()
    await asyncio.gather(*waiting)
    assert seen == list(range(50))
    for gate in gates:
        gate.open.set()


@in_its_own_loop
async def test_an_exception_is_given_and_the_thread_goes_on(
    pool: DatabaseThreads,
) -> None:
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 1, 0)
    assert await pool.run(divmod, 7, 2) == (3, 1)


@in_its_own_loop
async def test_cancelled_work_is_passed_over(pool: DatabaseThreads) -> None:
    gates = await busy(pool, 3)
    seen: list[str] = []
    cancelled = asyncio.ensure_future(pool.run(seen.append, "cancelled"))
    kept = asyncio.ensure_future(pool.run(seen.append, "kept"))
    await asyncio.sleep(0)
    cancelled.cancel()
    gates[0].open.set()
    await kept
    assert seen == ["kept"]
    for gate in gates:
        gate.open.set()


@in_its_own_loop
async def test_a_write_that_waits_is_done_though_it_is_cancelled(
    pool: DatabaseThreads,
) -> None:
    gates = await busy(pool, 3)
    seen: list[str] = []
    cancelled = asyncio.ensure_future(pool.finish(seen.append, "written"))
    await asyncio.sleep(0)
    cancelled.cancel()
    for gate in gates:
        gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert seen == ["written"]


@in_its_own_loop
async def test_closing_finishes_what_was_taken(pool: DatabaseThreads) -> None:
    gates = await busy(pool, 3)
    waiting = asyncio.ensure_future(pool.run(threading.get_ident))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(asyncio.to_thread(pool.close))
    for gate in gates:
        gate.open.set()
    assert await waiting
    await closing
    assert not named()


def test_a_loop_that_is_closed_meanwhile_is_let_go(pool: DatabaseThreads) -> None:
    gate = Gate()

    async def leave() -> None:
        leaving = asyncio.ensure_future(pool.run(gate))
        await asyncio.to_thread(gate.begun.wait, 10)
        leaving.cancel()

    asyncio.run(leave())
    gate.open.set()
    assert asyncio.run(pool.run(threading.get_ident))


# The call is at work when the interpreter begins to end.
_EXIT = """
import asyncio, threading, time
import django
django.setup()
from agent_sessions.concurrency.threads import ConnectionPolicy, DatabaseThreads
pool = DatabaseThreads("default", ConnectionPolicy(size=2))
begun = threading.Event()

def work():
    begun.set()
    time.sleep(0.2)
    print("finished", flush=True)

async def main():
    working = asyncio.ensure_future(pool.run(work))
    await asyncio.to_thread(begun.wait, 10)
    working.cancel()

asyncio.run(main())
"""


def test_an_interpreter_that_ends_waits_for_what_was_taken(
    database_environment: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _EXIT],
        env=database_environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["finished"]
    assert not done.stderr


def test_a_fork_does_not_wait_for_threads_that_have_ended(
    pool: DatabaseThreads,
) -> None:
    async def use() -> None:
        await asyncio.gather(*(pool.run(int) for _ in range(4)))

    asyncio.run(use())
    pool.close()
    done = threading.Event()

    def fork() -> None:
        pool.before_fork()
        pool.after_fork(in_child=False)
        done.set()

    threading.Thread(target=fork, daemon=True).start()
    assert done.wait(forks.PATIENCE / 2)


def test_a_fork_waits_for_a_call_under_way_and_holds_up_the_next(
    pool: DatabaseThreads,
) -> None:
    gate, resting, go_on = Gate(), threading.Event(), threading.Event()
    seen: list[str] = []

    def fork() -> None:
        pool.before_fork()
        resting.set()
        assert go_on.wait(10)
        pool.after_fork(in_child=False)

    async def main() -> None:
        working = asyncio.ensure_future(pool.run(gate))
        await asyncio.to_thread(gate.begun.wait, 10)
        forking = threading.Thread(target=fork)
        forking.start()
        assert not resting.wait(0.05)
        gate.open.set()
        await working
        await asyncio.to_thread(resting.wait, 10)
        # In a thread: the loop would wait for the fork as well.
        late = threading.Thread(target=lambda: asyncio.run(pool.run(seen.append, "x")))
        late.start()
        late.join(0.05)
        assert seen == []
        go_on.set()
        await asyncio.to_thread(late.join, 10)
        forking.join()

    asyncio.run(main())
    assert seen == ["x"]


_BEGIN = """
import asyncio, os, threading
import django
django.setup()
from django.db import connections, transaction
from agent_sessions.concurrency.threads import ConnectionPolicy, DatabaseThreads
from agent_sessions.models import AgentSession
pool = DatabaseThreads("default", ConnectionPolicy(size=1))
sessions = AgentSession.objects
"""

_CLOSING = """
asyncio.run(pool.run(sessions.count))
begun, go_on = threading.Event(), threading.Event()

def read(connection):
    begun.set()
    assert go_on.wait(10)
    cursor = connection.connection.cursor()
    cursor.execute("SELECT 1")
    return cursor.fetchone()[0]

found = []
reading = threading.Thread(target=lambda: found.append(pool.here(read)))
reading.start()
assert begun.wait(10)
closing = threading.Thread(target=pool.close)
closing.start()
closing.join(0.1)
go_on.set()
reading.join()
closing.join()
print(found)
"""

_FORKING = """
def write():
    with transaction.atomic():
        sessions.create(backend="default", session_id="before")
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)
        sessions.create(backend="default", session_id="after")

asyncio.run(pool.finish(write))
print([sessions.count()])
sessions.all().delete()
"""

# The first fork gives up waiting for a call, of which the child's own knows nothing.
_FORKING_AGAIN = """
import time
from agent_sessions.concurrency import forks

forks.PATIENCE = 1.0
begun, go_on = threading.Event(), threading.Event()

def work():
    begun.set()
    assert go_on.wait(20)

working = threading.Thread(target=lambda: asyncio.run(pool.run(work)))
working.start()
assert begun.wait(10)
if not (child := os.fork()):
    began = time.monotonic()
    if not (grandchild := os.fork()):
        os._exit(0)
    os.waitpid(grandchild, 0)
    os._exit(time.monotonic() - began > forks.PATIENCE)
late = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
go_on.set()
working.join()
print([late])
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(_CLOSING, "[1]", id="a close beside a read"),
        pytest.param(_FORKING, "[2]", id="a fork in a transaction"),
        pytest.param(_FORKING_AGAIN, "[0]", id="a fork of a child"),
    ],
)
def test_what_happens_beside_a_connection_in_use(
    source: str, expected: str, database_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + source],
        env=database_environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr[-2000:]
