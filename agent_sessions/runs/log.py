"""What a run has said so far, and those who listen in this process and in others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_sessions.agui import LAST, SYNC_PREFIX, OpenRun, merge
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
        return self.event["type"] in LAST

    def as_dict(self) -> dict[str, Any]:
        """Return the frame as it is sent."""
        return {"id": self.id, "chunk": self.event}


DELTAS = frozenset(
    {"TEXT_MESSAGE_CONTENT", "TOOL_CALL_ARGS", "REASONING_MESSAGE_CONTENT"}
)


class Joining:
    """Pass events on; deltas wait a moment to be joined."""

    def __init__(
        self, say: Callable[[Event], object], interval: float, size: int
    ) -> None:
        self._say = say
        self._interval = interval
        self._size = size
        self._deltas: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, event: Event) -> None:
        """Pass an event on, after the deltas that came before it."""
        if event["type"] not in DELTAS:
            self.flush()
            self._say(event)
            return
        self._deltas.append(event)
        if sum(len(delta["delta"]) for delta in self._deltas) >= self._size:
            self.flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval, self.flush)

    def flush(self) -> None:
        """Pass on the deltas that wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deltas, self._deltas = self._deltas, []
        for event in merge(deltas):
            self._say(event)


class Subscription:
    """One listener's bounded queue; putting into it never waits.

    A listener that falls behind, or misses a number, loses its queue and is told that it
    lags, so that it is brought up to date: memory stays bounded whatever a slow socket
    does.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.lagging = False
        # The run that it has heard the start of, and the last frame that it took.
        self.open = OpenRun()
        self.last: Frame | None = None
        # The key of a run and the number up to which all was told by the rows.
        self.since = 0, 0
        self._room = limit
        # The run and the number of the last frame that was queued.
        self._at = "", 0
        self._skips = ""
        self._queue: deque[Frame] = deque()
        self._wake = asyncio.Event()

    def put(self, frame: Frame) -> None:
        """Queue a frame, or mark the listener as lagging."""
        run_id, number = self._at
        if self.lagging or (frame.run_id == run_id and frame.number <= number):
            return
        if frame.run_id == self._skips:
            # Its start is gone, so its middle would make no sense.
            if frame.is_last:
                self.give_up()
            return
        expected = number + 1 if frame.run_id == run_id else 1
        if frame.number != expected or len(self._queue) >= self._room:
            self.give_up()
            return
        self._queue.append(frame)
        self._at = frame.run_id, frame.number
        self._wake.set()

    def restart(
        self,
        frames: list[Frame],
        told: OpenRun,
        *,
        at: tuple[str, int] = ("", 0),
        skips: str = "",
    ) -> None:
        """Replace the queue by what follows what was told, up to `at`.

        The run `skips` is going on but can't be told from its start: the listener is
        brought up to date at its end.
        """
        self.open = told
        self._queue = deque(frames)
        self._room = self.limit + len(frames)
        self._at, self._skips = at, skips
        self.lagging = False
        self._wake.set()

    def give_up(self) -> None:
        """Bring the listener up to date: what it waits for has happened elsewhere."""
        self.lagging = True
        self._queue.clear()
        self._wake.set()

    @property
    def is_idle(self) -> bool:
        """Whether it has taken all that there is to tell."""
        return not self._queue and not self.lagging

    @property
    def is_resting(self) -> bool:
        """Whether it has heard the end of all that it was told."""
        return self.is_idle and not self.open.run_id

    async def get(self) -> Frame | None:
        """Wait for the next frame; None says that the listener lags."""
        while True:
            if self.lagging or (self._queue and not self._may_follow(self._queue[0])):
                self.lagging = True
                return None
            if self._queue:
                self.last = self._queue.popleft()
                self.open.follow(self.last.event)
                return self.last
            self._wake.clear()
            await self._wake.wait()

    def _may_follow(self, frame: Frame) -> bool:
        """Return whether a frame is the next one of what has been heard.

        Where a run begins within another, the end of that one was lost. What comes
        from another process may also be late: after its run's end was told by the rows.
        """
        if frame.event["type"] == "RUN_STARTED":
            return not self.open.run_id
        is_apart = frame.run_id.startswith(SYNC_PREFIX)
        return is_apart or frame.run_id == self.open.run_id


logger = logging.getLogger("agent_sessions.runs")

NUDGE = "agent_sessions.nudge"


def group_of(conversation: Conversation) -> str:
    """Name the group of a conversation and its owner.

    The owner is in it: a session id that is deleted may be taken by somebody else while
    sockets of the first owner are open. Group names allow few characters and under 100
    of them; session ids more of both.
    """
    key = conversation.key
    owner = None if key.user_id is None else str(key.user_id)
    place = [conversation.backend.alias, conversation.using, conversation.pk]
    parts = [*place, owner, key.session_id, conversation.table]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"agent_sessions.{digest[:40]}"


class ChannelRelay:
    """Tells other processes that there is something new to read, not what.

    In order and without holding up a run. A nudge that gets lost costs half a second:
    they look at the rows anyway.
    """

    def __init__(self, layer: Any, *, limit: int = 1_000) -> None:
        self.layer = layer
        self._queue: deque[tuple[str, dict[str, Any]]] = deque(maxlen=limit)
        self._task: asyncio.Task[None] | None = None

    def nudge(self, conversation: Conversation, run_id: str, number: int = 0) -> None:
        """Send a nudge: a run has new rows, or is asked to stop."""
        message = {"type": NUDGE, "run_id": run_id, "number": number}
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
                logger.warning(
                    "The channel layer refused a nudge (%s). Check CHANNEL_LAYERS.",
                    type(exc).__name__,
                )
