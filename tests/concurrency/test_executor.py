"""The executor that gives work to the thread that was at work last."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from agent_sessions.concurrency import forks
from agent_sessions.concurrency.executor import WarmExecutor

pytestmark = pytest.mark.one_database


@pytest.fixture
def pool() -> Iterator[WarmExecutor]:
    made = WarmExecutor(3, "warm")
    yield made
    made.shutdown()


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.open.wait(10)
        return threading.get_ident()


def busy(pool: WarmExecutor, count: int) -> list[Gate]:
    gates = [Gate() for _ in range(count)]
    for gate in gates:
        pool.run(gate)
    for gate in gates:
        assert gate.begun.wait(10)
    return gates


def named(prefix: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(prefix)]


async def test_calls_one_after_the_other_share_a_thread(pool: WarmExecutor) -> None:
    gates = [Gate() for _ in range(3)]
    together = [pool.run(gate) for gate in gates]
    for gate in gates:
        gate.open.set()
    assert len({await future for future in together}) == 3
    first = await pool.run(threading.get_ident)
    assert {await pool.run(threading.get_ident) for _ in range(30)} == {first}


async def test_no_more_threads_than_allowed_and_no_fewer(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    waiting = pool.run(threading.get_ident)
    gates[1].open.set()
    assert await waiting != threading.get_ident()
    assert len(named("warm")) == 3
    for gate in gates:
        gate.open.set()


async def test_what_waits_keeps_its_order(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    seen: list[int] = []
    waiting = [pool.run(partial(seen.append, number)) for number in range(50)]
    gates[0].open.set()
    await asyncio.gather(*waiting)
    assert seen == list(range(50))
    for gate in gates:
        gate.open.set()


async def test_an_exception_is_given_and_the_thread_goes_on(pool: WarmExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: divmod(1, 0))
    assert await pool.run(lambda: divmod(7, 2)) == (3, 1)


async def test_an_idle_thread_can_be_kept_from_working(pool: WarmExecutor) -> None:
    assert pool.take_idle() is None
    gates = busy(pool, 3)
    assert pool.take_idle() is None
    gates[0].open.set()
    await asyncio.sleep(0.05)
    thread = pool.take_idle()
    assert thread is not None
    waiting = pool.run(threading.get_ident)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    pool.give_back(thread)
    # It does then what was given to it meanwhile, and more.
    assert await waiting == await pool.run(threading.get_ident) == thread.ident
    for gate in gates:
        gate.open.set()


async def test_a_shutdown_waits_for_who_is_kept_from_working() -> None:
    pool = WarmExecutor(1, "kept")
    await pool.run(threading.get_ident)
    thread = pool.take_idle()
    assert thread is not None
    ending = asyncio.ensure_future(asyncio.to_thread(pool.shutdown))
    await asyncio.sleep(0.05)
    assert not ending.done()
    pool.give_back(thread)
    await ending
    assert named("kept") == []


async def test_cancelled_work_is_passed_over(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    seen: list[str] = []
    cancelled = pool.run(lambda: seen.append("cancelled"))
    kept = pool.run(lambda: seen.append("kept"))
    assert cancelled.cancel()
    gates[0].open.set()
    await kept
    assert seen == ["kept"]
    for gate in gates:
        gate.open.set()


async def test_work_that_is_cancelled_meanwhile_ends_unheard(
    pool: WarmExecutor,
) -> None:
    (gate,) = busy(pool, 1)
    other = pool.run(threading.get_ident)
    begun = Gate()
    cancelled = pool.run(begun)
    assert begun.begun.wait(10)
    cancelled.cancel()
    for each in (gate, begun):
        each.open.set()
    await other
    assert await pool.run(lambda: "goes on") == "goes on"
    assert cancelled.cancelled()


async def test_shutdown_finishes_what_was_taken() -> None:
    pool = WarmExecutor(1, "ending")
    (gate,) = busy(pool, 1)
    waiting = pool.run(threading.get_ident)
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.run(threading.get_ident)
    gate.open.set()
    assert await waiting
    pool.shutdown()
    assert not named("ending")


def test_a_loop_that_is_closed_meanwhile_is_let_go(pool: WarmExecutor) -> None:
    gate = Gate()

    async def leave() -> None:
        pool.run(gate)

    asyncio.run(leave())
    gate.open.set()

    async def again() -> int:
        return await pool.run(threading.get_ident)

    assert asyncio.run(again())
    assert len(named("warm")) <= 2


# The call is at work when the interpreter begins to end.
_EXIT = """
import asyncio, threading, time
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django.contrib.auth",
    "django.contrib.contenttypes", "agent_sessions"])
django.setup()
from agent_sessions.concurrency import forks
from agent_sessions.concurrency.executor import WarmExecutor
pool = WarmExecutor(2, "exit")
begun = threading.Event()

def work():
    begun.set()
    time.sleep(0.2)
    print("finished", flush=True)

async def main():
    pool.run(work)
    begun.wait(10)

asyncio.run(main())
"""


def test_an_interpreter_that_ends_waits_for_what_was_taken() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _EXIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["finished"]
    assert not done.stderr


def test_a_fork_does_not_wait_for_an_executor_that_was_shut_down() -> None:
    executor = WarmExecutor(2)

    async def use() -> None:
        await asyncio.gather(*(executor.run(lambda: None) for _ in range(4)))

    asyncio.run(use())
    executor.shutdown()
    done = threading.Event()

    def fork() -> None:
        executor.before_fork()
        executor.after_fork(in_child=False)
        done.set()

    threading.Thread(target=fork, daemon=True).start()
    assert done.wait(forks.PATIENCE / 2)
