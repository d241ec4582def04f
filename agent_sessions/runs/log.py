"""What a run has said so far, and those who listen."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frame:
    """One numbered event of a run."""

    run_id: str
    number: int
    event: Event

    @property
    def id(self) -> str:
        """The frame's id: the run's, and the event's number in it."""
        return f"{self.run_id}:{self.number}"

    @property
    def is_last(self) -> bool:
        """Whether the run says nothing after this."""
        return self.event["type"] in {"RUN_FINISHED", "RUN_ERROR"}

    def as_dict(self) -> dict[str, Any]:
        """Return the frame as it is sent."""
        return {"id": self.id, "chunk": self.event}


class EventLog:
    """The events of one run, bounded in number and bytes.

    Numbers count from 1 without holes. Once the bound is passed the oldest events
    are dropped, and `complete` says that a replay from the start is gone.
    """

    def __init__(self, run_id: str, *, max_events: int, max_bytes: int) -> None:
        self.run_id = run_id
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.complete = True
        self._frames: deque[tuple[Frame, int]] = deque()
        self._bytes = 0
        self._last = 0

    def append(self, event: Event) -> Frame:
        """Number an event and keep it."""
        self._last += 1
        frame = Frame(self.run_id, self._last, event)
        size = len(json.dumps(event))
        self._frames.append((frame, size))
        self._bytes += size
        while len(self._frames) > self.max_events or self._bytes > self.max_bytes:
            _, dropped = self._frames.popleft()
            self._bytes -= dropped
            self.complete = False
        return frame

    def frames(self) -> list[Frame]:
        """Return what is kept, oldest first."""
        return [frame for frame, _ in self._frames]

    def after(self, number: int) -> list[Frame] | None:
        """Return what came after a number; None where part of that is gone."""
        if not 0 <= number <= self._last:
            return None
        frames = [frame for frame, _ in self._frames if frame.number > number]
        return frames if len(frames) == self._last - number else None


class Subscription:
    """One listener's bounded queue; putting into it never waits.

    A listener that falls behind loses its queue and is told that it lags, so that it
    takes a fresh start: memory stays bounded whatever a slow socket does.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.lagging = False
        self._room = limit
        self._missed_run: str | None = None
        self._remote: dict[str, int] = {}
        self._queue: deque[Frame] = deque()
        self._wake = asyncio.Event()

    def put(self, frame: Frame) -> None:
        """Queue a frame, or mark the listener as lagging."""
        if self.lagging:
            return
        if frame.run_id == self._missed_run:
            # Its start is gone, so its middle would make no sense.
            self.lagging = frame.is_last
        elif len(self._queue) >= self._room:
            self.lagging = True
        else:
            self._queue.append(frame)
        if self.lagging:
            self._queue.clear()
        self._wake.set()

    def put_remote(self, frame: Frame) -> None:
        """Queue a frame that came from another process, where some may get lost.

        A run is followed from its first frame on and as long as no number is missing;
        else the listener is brought up to date at its end.
        """
        known = self._remote.get(frame.run_id, 0)
        if frame.number <= known:
            return
        if frame.number == known + 1:
            self._remote = {frame.run_id: frame.number}
        else:
            self._missed_run = frame.run_id
        self.put(frame)

    def restart(self, frames: list[Frame], *, missed_run: str | None = None) -> None:
        """Replace the queue by a fresh beginning.

        `missed_run` is going on but can't be told from its start: the listener is
        brought up to date at its end.
        """
        self._queue = deque(frames)
        self._room = self.limit + len(frames)
        self._missed_run = missed_run
        self.lagging = False
        self._wake.set()

    async def get(self) -> Frame | None:
        """Wait for the next frame; None says that the listener lags."""
        while True:
            if self.lagging:
                return None
            if self._queue:
                return self._queue.popleft()
            self._wake.clear()
            await self._wake.wait()
