"""What holds when the sidecar or its store fails, at any moment."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.exceptions import StorageError
from tests.servers.dapr import DaprSidecar, Refused
from tests.support.dapr_stores import HEAD, KEY, head_of, make_backend, said, says

pytestmark = pytest.mark.one_database


@pytest.fixture
def backend(dapr_server: DaprSidecar) -> Iterator[DaprBackend]:
    found = make_backend()
    yield found
    found.close()


def once(
    code: str, *, applied: bool, head: bool = True
) -> Callable[[str, list[str], bool], str | None]:
    """Fail the next write of a head (or of a segment), before or after it is done."""
    left = [code]

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        if name.startswith("Get") or done is not applied or (HEAD in keys) is not head:
            return None
        return left.pop() if left else None

    return interfere


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL"])
@pytest.mark.parametrize("applied", [False, True])
def test_an_answer_that_is_lost_doubles_nothing(
    backend: DaprBackend,
    dapr_server: DaprSidecar,
    code: str,
    applied: bool,
) -> None:
    """The same change is written once, whether or not the first try arrived."""
    backend.append(KEY, says(*range(7)))
    dapr_server.faults.interfere = once(code, applied=applied)
    backend.append(KEY, says("a", "b"))
    assert said(backend) == [*"0123456", "a", "b"]
    dapr_server.faults.interfere = once(code, applied=applied)
    assert backend.pop(KEY) == says("b")[0]
    assert said(backend) == [*"0123456", "a"]
    dapr_server.faults.interfere = once(code, applied=applied)
    assert backend.clear(KEY) == 8
    assert said(backend) == []


def test_a_first_write_whose_answer_is_lost(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    dapr_server.faults.interfere = once("UNAVAILABLE", applied=True)
    backend.append(KEY, says("a"))
    assert said(backend) == ["a"]


def test_a_store_that_is_down_is_a_clear_error(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    backend.append(KEY, says("a"))
    dapr_server.faults.unavailable = True
    with pytest.raises(StorageError, match=r"can't be reached.*UNAVAILABLE"):
        backend.latest(KEY, None)
    with pytest.raises(StorageError, match="Nothing was written"):
        backend.append(KEY, says("secret"))
    with pytest.raises(StorageError, match="Nothing was written"):
        backend.pop(KEY)
    dapr_server.faults.unavailable = False
    assert said(backend) == ["a"]


def test_what_is_not_known_is_said(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """The store goes down between a write and its answer, and stays down."""
    backend.append(KEY, says("a"))

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        if done and not name.startswith("Get"):
            dapr_server.faults.unavailable = True
            return "UNAVAILABLE"
        return None

    dapr_server.faults.interfere = interfere
    with pytest.raises(StorageError, match="not known"):
        backend.append(KEY, says("b"))
    dapr_server.reset_faults()
    assert said(backend) == ["a", "b"]


def test_an_unknown_store_is_named(dapr_server: DaprSidecar) -> None:
    backend = make_backend(store_name="elsewhere")
    with pytest.raises(StorageError, match=r"'elsewhere' refused.*state store"):
        backend.append(KEY, says("a"))
    backend.close()


def test_a_crash_between_segment_and_head_harms_nothing(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """Every write of a change is cut off in its turn, for good."""
    for number in range(4):
        backend.append(KEY, says(number))
    for cut in range(3):
        seen: list[str] = []

        def interfere(
            name: str, keys: list[str], done: bool, cut: int = cut, seen: Any = seen
        ) -> str | None:
            if not done and not name.startswith("Get"):
                seen.append(name)
                return "INTERNAL" if len(seen) > cut else None
            return None

        before = said(backend)
        dapr_server.faults.interfere = interfere
        new = says(*(f"{cut}.{n}" for n in range(9)))
        try:
            backend.append(KEY, new)
        except StorageError:
            dapr_server.faults.interfere = None
            assert said(backend) == before
        else:
            dapr_server.faults.interfere = None
            assert said(backend) == [*before, *(item["content"] for item in new)]
        backend.append(KEY, says("goes on"))
        assert said(backend)[-1] == "goes on"


def test_a_clear_that_is_cut_off_is_ended_by_the_next(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    backend.append(KEY, says(*range(40)))
    dapr_server.faults.interfere = lambda name, keys, done: (
        "INTERNAL" if name == "DeleteState" else None
    )
    with pytest.raises(StorageError, match="Clear it again"):
        backend.clear(KEY)
    assert said(backend) == []
    assert len(dapr_server.records) > 1
    dapr_server.faults.interfere = None
    assert backend.clear(KEY) == 0
    assert list(dapr_server.records) == [HEAD]


def test_what_a_pop_leaves_is_deleted_later(
    backend: DaprBackend, dapr_server: DaprSidecar, caplog: pytest.LogCaptureFixture
) -> None:
    backend.append(KEY, says(*range(20)))
    dapr_server.faults.interfere = lambda name, keys, done: (
        "INTERNAL" if name == "DeleteState" else None
    )
    assert backend.pop(KEY) == says(19)[0]
    assert "next change tries again" in caplog.text
    dapr_server.faults.interfere = None
    assert backend.pop(KEY) == says(18)[0]
    head = head_of(dapr_server)
    assert head.garbage == ()
    assert len(dapr_server.records) == 1 + head.sealed


def test_a_stop_in_mid_write_and_a_start(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """What was acknowledged is there; the rest had an error; the process goes on."""
    acknowledged: list[str] = []
    failed: list[str] = []
    stopping = threading.Event()

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        if len(acknowledged) == 10 and done and HEAD in keys and name != "GetState":
            stopping.set()
        return None

    def write() -> None:
        for number in range(14):
            try:
                backend.append(KEY, says(f"{number}a", f"{number}b"))
            except StorageError:
                failed.append(str(number))
            else:
                acknowledged.append(str(number))

    dapr_server.faults.interfere = interfere
    writer = threading.Thread(target=write)
    writer.start()
    assert stopping.wait(30)
    dapr_server.stop()
    writer.join()
    dapr_server.start()
    assert failed
    deadline = time.monotonic() + 30
    while True:
        try:
            found = said(backend)
            break
        except StorageError:
            assert time.monotonic() < deadline
    stored = [text[:-1] for text in found[::2]]
    assert found == [number + half for number in stored for half in "ab"]
    assert set(acknowledged) <= set(stored)
    assert set(stored) <= set(acknowledged) | set(failed)
    backend.append(KEY, says("goes on"))
    assert said(backend) == [*found, "goes on"]


def test_a_writer_that_wakes_up_late_harms_nothing(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """Its segment arrives when the history has gone another way long since."""
    for number in range(4):
        backend.append(KEY, says(number))
    late: list[Any] = []
    save = dapr_server.save

    def hold_back(items: Any) -> None:
        late.extend(copy.deepcopy(list(items)))
        raise Refused("INTERNAL", "it sleeps")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dapr_server, "save", hold_back)
        with pytest.raises(StorageError):
            backend.append(KEY, says("lost"))
    assert backend.pop(KEY) == says(3)[0]
    backend.append(KEY, says("x"))
    backend.append(KEY, says("y"))
    assert head_of(dapr_server).sealed == 1
    assert late
    save(late)
    assert said(backend) == ["0", "1", "2", "x", "y"]


@pytest.mark.parametrize("seed", range(2))
def test_a_model_of_a_history_with_faults(dapr_server: DaprSidecar, seed: int) -> None:
    """Random changes by two processes' backends, lost answers and late writes.

    Every write of a segment that came in is carried out again at a random later
    moment, as by a writer that was asleep: the history must not care.
    """
    chance = random.Random(seed)  # noqa: S311 - any numbers do
    late: list[Any] = []
    codes = ["UNAVAILABLE", "INTERNAL"]

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        if late and chance.random() < 0.3:
            dapr_server.save([chance.choice(late)])
        return chance.choice(codes) if chance.random() < 0.04 else None

    real = dapr_server.apply

    def apply(item: Any) -> None:
        if item.key != HEAD and not item.etag.value:
            late.append(copy.deepcopy(item))
        real(item)

    dapr_server.apply = apply  # type: ignore[method-assign]
    backends = [make_backend(), make_backend()]
    expected: list[str] = []
    try:
        for step in range(60):
            dapr_server.faults.interfere = interfere
            backend = chance.choice(backends)
            before, kind = list(expected), chance.random()
            try:
                if kind < 0.6:
                    count = chance.choice([1, 2, 3, 5, 20])
                    texts = [f"{step}.{n}" for n in range(count)]
                    expected += texts
                    backend.append(KEY, says(*texts))
                elif kind < 0.97:
                    popped = says(expected.pop())[0] if expected else None
                    assert backend.pop(KEY) == popped
                else:
                    expected = []
                    backend.clear(KEY)
            except StorageError:
                dapr_server.faults.interfere = None
                found = said(backend)
                assert found in (before, expected)
                expected = found
            dapr_server.faults.interfere = None
            assert said(backend) == expected
    finally:
        del dapr_server.apply
        for backend in backends:
            backend.close()


def test_a_slow_request_has_an_end(dapr_server: DaprSidecar) -> None:
    backend = make_backend(timeout=0.05)
    backend.append(KEY, says("a"))
    dapr_server.faults.delay = 0.2
    with pytest.raises(StorageError, match=r"no answer within 0\.05 s"):
        backend.latest(KEY, None)
    dapr_server.faults.delay = 0
    assert said(backend) == ["a"]
    backend.close()


async def test_the_health_check_lets_the_loop_go_on(dapr_server: DaprSidecar) -> None:
    """A sidecar that isn't well: an error after a while in which others worked."""
    dapr_server.faults.healthy = False
    backend = make_backend(health_timeout=0.3)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(StorageError, match=r"health check at http.*within 0\.3 s"):
        await backend.alatest(KEY, None)
    assert ticks > 5
    dapr_server.faults.healthy = True
    await backend.aappend(KEY, says("a"))
    ticking.cancel()


def test_without_a_health_check_nobody_asks(dapr_server: DaprSidecar) -> None:
    dapr_server.faults.healthy = False
    backend = make_backend(health_timeout=None)
    backend.append(KEY, says("a"))
    assert said(backend) == ["a"]
    backend.close()


def test_too_many_others_are_an_error_that_ends(
    backend: DaprBackend, dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_sessions.backends.dapr.history.ATTEMPTS", 5)
    backend.append(KEY, says("a"))

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        if done and name == "GetState":
            dapr_server.records[HEAD].version += 1
        return None

    dapr_server.faults.interfere = interfere
    with pytest.raises(StorageError, match="too many others"):
        backend.append(KEY, says("b"))
    dapr_server.faults.interfere = None
    assert said(backend) == ["a"]


@pytest.mark.parametrize("wrong", [-1800, 1800])
def test_a_history_outlives_a_writer_whose_clock_is_wrong(
    dapr_server: DaprSidecar, wrong: int
) -> None:
    """How long its segments live is judged by the clocks of all who write."""
    backend = make_backend(ttl=600)

    def append(texts: list[dict[str, Any]], *, at: int, off_by: int = 0) -> None:
        # The sidecar, which runs in this process too, has the right time.
        dapr_server.late = -off_by
        clock = time.time

        def now() -> float:
            return clock() + at + off_by

        with mock.patch.object(time, "time", now):
            backend.append(KEY, texts)

    append(says(*range(9)), at=0, off_by=wrong)
    for step in range(1, 13):
        append(says(8 + step), at=step * 500)
    dapr_server.late = 12 * 500
    assert said(backend) == [str(number) for number in range(21)]
    backend.close()
