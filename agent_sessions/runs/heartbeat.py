"""Keep the leases of a process alive, from a thread that no tool can block."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.leases import DatabaseNow
from agent_sessions.concurrency.connections import transact
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.models import AgentSession
from agent_sessions.runs import event_rows

if TYPE_CHECKING:
    from agent_sessions.runs.records import Lease
    from agent_sessions.runs.setup import Conversation

logger = logging.getLogger("agent_sessions.runs")

# Seconds until a beat that failed is tried again, if beats aren't more frequent.
AGAIN_AFTER = 2.0


@dataclass(eq=False)
class Pulse:
    """The heartbeat of one run; those of one group beat together.

    `beat` gets the `lease` of each, and returns which of them are still held.
    """

    beat: Callable[[Sequence[Any]], Awaitable[Sequence[bool]]]
    # Called in the run's loop once a database that answers says that it is not.
    lost: Callable[[], None]
    interval: float
    # None where the run's code blocks: then `lost` is called in the thread that beats.
    loop: asyncio.AbstractEventLoop | None = field(
        default_factory=asyncio.get_running_loop
    )
    lease: Any = None
    group: object = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    due: float = 0

    def __post_init__(self) -> None:
        """Beat for the first time after an interval: the lease has just been taken."""
        self.due = time.monotonic() + self.interval

    async def run(self) -> None:
        """Beat until the lease is lost, in a task of the run's own loop."""
        while True:
            await asyncio.sleep(max(self.due - time.monotonic(), 0))
            if await beat_together([self]):
                self.lost()
                return


def beat(using: str, held: Sequence[tuple[Conversation, Lease]]) -> list[bool]:
    """Keep leases alive in one statement; return which of them are still held.

    A row that somebody has locked waits for the next beat, and holds up no other.
    """
    # Two runs of one session may beat: one whose lease is lost, and the next.
    wanted = [
        (conversation.pk, (lease.run.run_id, lease.fence))
        for conversation, lease in held
    ]
    pks = {pk for pk, _ in wanted}
    rows = AgentSession._base_manager.using(using)

    def touch() -> dict[int, tuple[str, int]]:
        found = event_rows.hold(using, pks)
        mine = [pk for pk, lease in wanted if found.get(pk) == lease]
        rows.filter(pk__in=mine).update(run_seen_at=DatabaseNow())
        return found

    found = transact(using, touch)
    if others := pks - found.keys():
        found |= event_rows.read_leases(using, others)
    return [found.get(pk) == lease for pk, lease in wanted]


async def beat_together(pulses: Sequence[Pulse]) -> list[Pulse]:
    """Beat for runs; return those whose leases are lost. An error is no answer."""
    after = min(pulse.interval for pulse in pulses)
    held: Sequence[bool] = [True] * len(pulses)
    try:
        calling = pulses[0].beat([pulse.lease for pulse in pulses])
        held = await asyncio.wait_for(calling, after)
    except Exception as exc:
        logger.warning("A heartbeat failed (%s)", type(exc).__name__)
        after = min(after, AGAIN_AFTER)
    for pulse in pulses:
        pulse.due = time.monotonic() + after
    return [pulse for pulse, is_held in zip(pulses, held, strict=True) if not is_held]


class Heart:
    """A thread that beats for all runs of a process; it ends with the last of them."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._pulses: set[Pulse] = set()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._news = threading.Event()

    def start(self, pulse: Pulse) -> None:
        """Beat for a run from now on."""
        with self._lock:
            if self._pid != os.getpid():
                # The runs of the parent, and the thread, stay with the parent.
                self._pulses, self._thread = set(), None
                self._news, self._pid = threading.Event(), os.getpid()
            self._pulses.add(pulse)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="agent_sessions-heartbeat", daemon=True
                )
                self._thread.start()
        self._news.set()

    def stop(self, pulse: Pulse) -> None:
        """Beat for a run no more."""
        with self._lock:
            self._pulses.discard(pulse)
        self._news.set()

    def _serve(self) -> None:
        while True:
            self._news.clear()
            with self._lock:
                if not self._pulses:
                    self._thread = None
                    return
                now = time.monotonic()
                late = {pulse.group for pulse in self._pulses if pulse.due <= now}
                due = [pulse for pulse in self._pulses if pulse.group in late]
                wait = min(pulse.due for pulse in self._pulses) - now
            if due:
                asyncio.run(self._beat(due))
            else:
                self._news.wait(wait)

    async def _beat(self, pulses: list[Pulse]) -> None:
        groups: dict[object, list[Pulse]] = {}
        for pulse in pulses:
            groups.setdefault(pulse.group, []).append(pulse)
        await asyncio.gather(
            *(
                asyncio.create_task(self._beat_group(own), context=own[0].context)
                for own in groups.values()
            )
        )

    async def _beat_group(self, pulses: list[Pulse]) -> None:
        for pulse in await beat_together(pulses):
            self._tell_lost(pulse)

    def _tell_lost(self, pulse: Pulse) -> None:
        with self._lock:
            is_awaited = pulse in self._pulses
            self._pulses.discard(pulse)
        if not is_awaited:
            return
        if pulse.loop is None:
            pulse.lost()
        elif not pulse.loop.is_closed():
            pulse.loop.call_soon_threadsafe(pulse.lost)


heart = Heart()


@contextlib.contextmanager
def beating(pulse: Pulse, *, in_thread: bool) -> Iterator[None]:
    """Beat in the block: from the thread, else in a task of the run's own loop."""
    task = None
    if in_thread:
        heart.start(pulse)
    else:
        # A caller's own connection serves no other thread.
        task = asyncio.create_task(pulse.run())
    try:
        yield
    finally:
        heart.stop(pulse)
        if task is not None:
            task.cancel()
