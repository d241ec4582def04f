"""The executor that gives work to the thread that was at work last."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait

import pytest

from agent_sessions.backends.database.executor import WarmExecutor


@pytest.fixture
def pool() -> Iterator[WarmExecutor]:
    with WarmExecutor(3, "warm") as made:
        yield made


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
        pool.submit(gate)
    for gate in gates:
        assert gate.begun.wait(10)
    return gates


def test_calls_one_after_the_other_share_a_thread(pool: WarmExecutor) -> None:
    gates = [Gate() for _ in range(3)]
    together = [pool.submit(gate) for gate in gates]
    for gate in gates:
        gate.open.set()
    assert len({future.result(10) for future in together}) == 3
    first = pool.submit(threading.get_ident).result()
    assert {pool.submit(threading.get_ident).result() for _ in range(30)} == {first}


def test_no_more_threads_than_allowed_and_no_fewer(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    waiting = pool.submit(threading.get_ident)
    assert not waiting.done()
    gates[1].open.set()
    assert waiting.result(10) != threading.get_ident()
    names = [t.name for t in threading.enumerate() if t.name.startswith("warm")]
    assert len(names) == 3
    for gate in gates:
        gate.open.set()


def test_what_waits_keeps_its_order(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    seen: list[int] = []
    waiting = [pool.submit(seen.append, number) for number in range(50)]
    gates[0].open.set()
    wait(waiting, 10)
    assert seen == list(range(50))
    for gate in gates:
        gate.open.set()


def test_an_exception_is_given_and_the_thread_goes_on(pool: WarmExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result(10)
    assert pool.submit(divmod, 7, 2).result(10) == (3, 1)


def test_cancelled_work_is_passed_over(pool: WarmExecutor) -> None:
    gates = busy(pool, 3)
    seen: list[str] = []
    cancelled = pool.submit(seen.append, "cancelled")
    kept = pool.submit(seen.append, "kept")
    assert cancelled.cancel()
    gates[0].open.set()
    kept.result(10)
    assert seen == ["kept"]
    for gate in gates:
        gate.open.set()


def test_shutdown_finishes_what_was_taken() -> None:
    pool = WarmExecutor(1, "ending")
    (gate,) = busy(pool, 1)
    waiting = pool.submit(threading.get_ident)
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(threading.get_ident)
    gate.open.set()
    assert waiting.result(10)
    pool.shutdown()
    assert not [t for t in threading.enumerate() if t.name.startswith("ending")]


def test_shutdown_may_cancel_what_has_not_begun() -> None:
    pool = WarmExecutor(1, "ending")
    (gate,) = busy(pool, 1)
    waiting = pool.submit(threading.get_ident)
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(10)
    gate.open.set()
    pool.shutdown()
