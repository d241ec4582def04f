"""The thread that beats for runs, whatever their event loop does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from agent_sessions.runs.heartbeat import Heart, Pulse


class Lease:
    """Counts beats, and answers as its test wants."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.beats = 0
        self.lost = threading.Event()

    async def beat(self, leases: Sequence[Lease]) -> list[bool]:
        self.beats += 1
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def pulse(self, interval: float = 0.05) -> Pulse:
        return Pulse(self.beat, self.lost.set, interval, group=self)


def beating() -> list[threading.Thread]:
    name = "agent_sessions-heartbeat"
    return [each for each in threading.enumerate() if each.name == name]


@pytest.fixture
def heart() -> Iterator[Heart]:
    yield Heart()
    end = time.monotonic() + 5
    while beating():
        assert time.monotonic() < end, "the thread goes on without a run"
        time.sleep(0.01)


async def test_it_beats_while_the_loop_is_blocked(heart: Heart) -> None:
    lease, other = Lease(), Lease()
    pulses = [lease.pulse(), other.pulse(0.1)]
    for pulse in pulses:
        heart.start(pulse)
    time.sleep(0.6)  # noqa: ASYNC251 - as a tool may
    assert lease.beats >= 4
    assert 2 <= other.beats < lease.beats
    for pulse in pulses:
        heart.stop(pulse)
    assert len(beating()) <= 1


async def test_an_error_is_no_answer(heart: Heart) -> None:
    lease = Lease(OSError("away"), TimeoutError(), True, False)
    heart.start(lease.pulse())
    assert await asyncio.to_thread(lease.lost.wait, 5)
    assert lease.beats == 4


async def test_a_run_in_its_loop_beats_alike(heart: Heart) -> None:
    lease = Lease(OSError("away"), True, False)
    await asyncio.wait_for(lease.pulse().run(), 5)
    assert lease.beats == 3
    assert lease.lost.is_set()


async def test_runs_of_a_group_beat_together(heart: Heart) -> None:
    asked: list[list[str]] = []
    told = threading.Event()

    async def beat(leases: Sequence[str]) -> list[bool]:
        asked.append(sorted(leases))
        return [lease != "lost" for lease in leases]

    for lease in ("kept", "lost"):
        lost = told.set if lease == "lost" else asked.clear
        heart.start(Pulse(beat, lost, 0.05, lease=lease))
    assert await asyncio.to_thread(told.wait, 5)
    assert asked[0] == ["kept", "lost"]
    for pulse in list(heart._pulses):
        heart.stop(pulse)


async def test_what_was_stopped_is_not_told(heart: Heart) -> None:
    lease = Lease(False)
    pulse = lease.pulse(0.2)
    heart.start(pulse)
    heart.stop(pulse)
    await asyncio.sleep(0.4)
    assert lease.beats == 0
    assert not lease.lost.is_set()
