"""Write the events of a process's runs: gathered, and without holding up a run."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from itertools import groupby

from django.utils import timezone

from agent_sessions.agui import LAST
from agent_sessions.backends import run_rows
from agent_sessions.concurrency.connections import without_caller
from agent_sessions.concurrency.settle import settle
from agent_sessions.runs import event_rows
from agent_sessions.runs.event_rows import About, Chunk, Unwritten
from agent_sessions.runs.log import Event, Frame
from agent_sessions.runs.records import Lease
from agent_sessions.runs.setup import Conversation

logger = logging.getLogger("agent_sessions.runs")

# Seconds between writes, and how long the next one waits after one that failed.
INTERVAL = 0.25
AGAIN_AFTER = 2.0
# So many events of a run wait while the database is away; older ones are given up.
MOST_WAITING = 20_000
# What a person has asked, and what makes a message, a call or a step whole: it is
# written at once.
BOUNDARIES = LAST | {
    "RUN_STARTED",
    "TEXT_MESSAGE_END",
    "REASONING_END",
    "TOOL_CALL_END",
    "TOOL_CALL_RESULT",
    "MESSAGES_SNAPSHOT",
}


class RunLog:
    """The events of one run; those that are not in rows yet are kept."""

    def __init__(
        self, conversation: Conversation, lease: Lease, about: Callable[[], About]
    ) -> None:
        self.conversation = conversation
        self.lease = lease
        # The number of the last event, from 1 on, and of the last one in rows.
        self.number = self.written = 0
        # Held while its events are written.
        self.lock = asyncio.Lock()
        threads = conversation.backend.threads
        # Those of several runs are written together in a thread of ours. A caller's own
        # connection, or one that is prepared for a tenant, serves its run alone.
        self.group = threads if threads.serves_caller() else None
        # Of the request that asked, whose synchronous middleware has ended by then.
        self.context = without_caller()
        self._about = about
        self._frames: list[Frame] = []
        # Never changed: one may be in rows already, though nobody has heard of that.
        self._chunks: deque[Chunk] = deque()

    def number_next(self, events: Sequence[Event]) -> list[Frame]:
        """Return what comes next as frames, which are not kept yet."""
        run_id, last = self.lease.run.run_id, self.number
        return [Frame(run_id, last + n, event) for n, event in enumerate(events, 1)]

    def append(self, frame: Frame, *, is_written: bool) -> None:
        """Keep a frame until it is written."""
        self.number = frame.number
        if is_written:
            return
        self._frames.append(frame)
        if len(self._frames) >= MOST_WAITING // 10:
            self._cut()

    def unwritten(self, *more: Frame) -> Unwritten:
        """Return what is to be written, and with it frames that are not kept yet."""
        self._cut()
        chunks = [*self._chunks, *([Chunk(more, self._about())] if more else ())]
        return Unwritten(self.conversation, self.lease.run, self.lease.fence, chunks)

    def settled(self, found: Unwritten) -> None:
        """Forget what was written, or is refused for good."""
        for chunk in found.chunks:
            self.written = chunk.last
            if self._chunks and self._chunks[0] is chunk:
                self._chunks.popleft()

    def since(self, at: tuple[str, int]) -> list[Frame] | None:
        """Return what comes after an event of the run; None where part of it is missing.

        Nothing comes after one of another run.
        """
        run_id, number = at
        if run_id != self.lease.run.run_id:
            return []
        later = [frame for frame in self.waiting if frame.number > number]
        is_next = later[0].number == number + 1 if later else number >= self.number
        return later if is_next else None

    @property
    def waiting(self) -> list[Frame]:
        """The frames that are not written yet."""
        return [
            frame
            for frames in (*(chunk.frames for chunk in self._chunks), self._frames)
            for frame in frames
        ]

    def _cut(self) -> None:
        if self._frames:
            self._chunks.append(Chunk(self._frames, self._about()))
            self._frames = []
        while sum(len(chunk.frames) for chunk in self._chunks) > MOST_WAITING:
            self._chunks.popleft()


class Writer:
    """Writes what the runs of one event loop have said, some times a second."""

    def __init__(self, tell: Callable[[RunLog], object]) -> None:
        # Called with each log of which something was written.
        self._tell = tell
        self._logs: dict[RunLog, None] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._removals: set[asyncio.Task[None]] = set()

    def said(self, log: RunLog, frame: Frame) -> None:
        """Write a log soon that has got a frame."""
        self._logs[log] = None
        if frame.event["type"] in BOUNDARIES:
            self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())

    async def flush(self, log: RunLog) -> None:
        """Write what a log has; return False where that failed."""
        await self._write([log], wait=True)

    def done(self, log: RunLog, keep: float) -> None:
        """Write nothing more of a log, and remove its rows after `keep` seconds."""
        self._logs.pop(log, None)
        loop = asyncio.get_running_loop()
        # Not the log: it holds its run, which memory has no use for any more.
        place = log.conversation, log.lease.run.pk, keep
        loop.call_later(keep, self._remove, *place, context=log.context)

    async def _serve(self) -> None:
        while self._logs:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), INTERVAL)
            self._news.clear()
            if not await self._write(list(self._logs)):
                await asyncio.sleep(AGAIN_AFTER)

    async def _write(self, logs: Sequence[RunLog], *, wait: bool = False) -> bool:
        """Write logs; return whether the database took them."""
        async with AsyncExitStack() as stack:
            # What is being written needs no second writer.
            free = [log for log in logs if wait or not log.lock.locked()]
            for log in free:
                await stack.enter_async_context(log.lock)
            calls = [
                asyncio.create_task(self._write_some(some), context=some[0].context)
                for some in _apart(free)
            ]
            if calls:
                await settle(asyncio.wait(calls))
        return all(call.result() for call in calls)

    async def _write_some(self, logs: Sequence[RunLog]) -> bool:
        found = [(log, log.unwritten()) for log in logs]
        found = [(log, unwritten) for log, unwritten in found if unwritten.chunks]
        if not found:
            return True
        conversation = logs[0].conversation
        try:
            settled = await conversation.backend.threads.run(
                event_rows.write, conversation.using, [each for _, each in found]
            )
        except Exception as exc:
            # The run goes on, and so do those who listen here.
            logger.warning("Events of runs wait to be written (%s)", type(exc).__name__)
            return False
        for (log, unwritten), is_settled in zip(found, settled, strict=True):
            if is_settled:
                log.settled(unwritten)
                self._tell(log)
                if not log.waiting:
                    self._logs.pop(log, None)
        return True

    def _remove(self, conversation: Conversation, run: int, keep: float) -> None:
        task = asyncio.create_task(self._remove_rows(conversation, run, keep))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove_rows(
        self, conversation: Conversation, run: int, keep: float
    ) -> None:
        place = conversation.using, conversation.pk, run
        ended = timezone.now() - timedelta(seconds=keep)
        try:
            await conversation.backend.threads.run(
                run_rows.remove_events, *place, ended
            )
        except Exception as exc:
            # The next run of the session removes them, else a command does.
            logger.info("Events of a run were not removed (%s)", type(exc).__name__)


def _apart(logs: Sequence[RunLog]) -> list[list[RunLog]]:
    """Return the logs that are written together."""

    def group(log: RunLog) -> tuple[int, str]:
        return id(log if log.group is None else log.group), log.conversation.using

    return [list(some) for _, some in groupby(sorted(logs, key=group), group)]
