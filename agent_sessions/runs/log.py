"""What a run has said so far, and those who listen in this process and in others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from agent_sessions.backends.leases import this_process
from agent_sessions.runs.setup import Conversation

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


logger = logging.getLogger("agent_sessions.runs")

FRAME = "agent_sessions.frame"
ABORT = "agent_sessions.abort"


def group_of(conversation: Conversation) -> str:
    """Name the group of a conversation and its owner.

    The owner is in it: a session id that is deleted may be taken by somebody else while
    sockets of the first owner are open. Group names allow few characters and under 100
    of them; session ids more of both.
    """
    key = conversation.key
    owner = None if key.user_id is None else str(key.user_id)
    parts = [conversation.backend.alias, conversation.pk, owner, key.session_id]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"agent_sessions.{digest[:40]}"


class ChannelRelay:
    """Send frames to the channel layer in their order, without holding up a run.

    What a slow layer can't take is dropped: receivers notice by the numbers.
    """

    def __init__(self, layer: Any, *, limit: int = 1_000) -> None:
        self.layer = layer
        self._queue: deque[tuple[str, dict[str, Any]]] = deque(maxlen=limit)
        self._task: asyncio.Task[None] | None = None

    def __call__(self, conversation: Conversation, frame: Frame) -> None:
        """Send a frame to the sockets of other processes."""
        self.send(
            conversation,
            {
                "type": FRAME,
                "run_id": frame.run_id,
                "number": frame.number,
                "event": frame.event,
            },
        )

    def abort(self, conversation: Conversation, run_id: str, mode: str) -> None:
        """Ask the process that has a run to stop it."""
        self.send(conversation, {"type": ABORT, "run_id": run_id, "mode": mode})

    def send(self, conversation: Conversation, message: dict[str, Any]) -> None:
        """Queue a message for the group of a conversation."""
        self._queue.append(
            (group_of(conversation), {**message, "origin": this_process()})
        )
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        while self._queue:
            group, message = self._queue.popleft()
            try:
                await self.layer.group_send(group, message)
            except Exception as exc:
                # Other processes catch up by a sync; the run itself must go on.
                logger.warning(
                    "The channel layer refused a frame (%s). Check CHANNEL_LAYERS.",
                    type(exc).__name__,
                )
