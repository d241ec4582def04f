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


@dataclass(frozen=True, slots=True)
class _Kept:
    """Events of neighbouring numbers, joined to one."""

    first: int
    frame: Frame
    size: int

    @property
    def unit(self) -> tuple[str, str] | None:
        """The message, call or step that the event is a part of."""
        for name in ("toolCallId", "messageId", "stepName"):
            if name in self.frame.event:
                return name, self.frame.event[name]
        return None


# What makes a message, a call or a step whole.
_ENDS = frozenset(
    {"TEXT_MESSAGE_END", "REASONING_END", "TOOL_CALL_RESULT", "STEP_FINISHED"}
)


# What is left of a log that has become too long.
_ROOM = 0.75


class EventLog:
    """The events of one run, bounded in number and bytes.

    Numbers count from 1 without holes. Once the bound is passed, what a message or a
    call says is joined to one event, first of those that have ended. Where that is not
    enough, the oldest messages and calls go as wholes: so the log is at any time a
    legal run from its start, if not the whole of it.
    """

    def __init__(self, run_id: str, *, max_events: int, max_bytes: int) -> None:
        self.run_id = run_id
        self.max_events = max_events
        self.max_bytes = max_bytes
        self._kept: list[_Kept] = []
        self._bytes = 0
        self._last = 0

    def append(self, event: Event) -> Frame:
        """Number an event and keep it."""
        self._last += 1
        frame = Frame(self.run_id, self._last, event)
        self._kept.append(_Kept(self._last, frame, _size(event)))
        self._bytes += self._kept[-1].size
        if self._is_over():
            self._shrink()
        return frame

    def frames(self) -> list[Frame]:
        """Return what is kept, oldest first; the first one is the run's start."""
        return [kept.frame for kept in self._kept]

    def after(self, number: int) -> list[Frame] | None:
        """Return what came after a number; None where part of that is gone or joined."""
        if not 0 <= number <= self._last:
            return None
        later = [kept for kept in self._kept if kept.frame.number > number]
        expected = number + 1
        for kept in later:
            if kept.first != expected:
                return None
            expected = kept.frame.number + 1
        return [kept.frame for kept in later]

    def _is_over(self, share: float = 1) -> bool:
        events, size = self.max_events * share, self.max_bytes * share
        return len(self._kept) > events or self._bytes > size

    def _shrink(self) -> None:
        """Make room for a while: each step looks at everything that is kept."""
        ended = {kept.unit for kept in self._kept if kept.frame.event["type"] in _ENDS}
        self._join(lambda kept: kept.unit in ended)
        if self._is_over(_ROOM):
            self._join(lambda kept: True)
        if self._is_over(_ROOM):
            self._drop(lambda kept: kept.unit is None or kept.unit in ended)
        if self._is_over():
            self._drop(lambda kept: "delta" in kept.frame.event, whole=False)

    def _join(self, may: Callable[[_Kept], bool]) -> None:
        """Join neighbours that say parts of the same."""
        joined: list[_Kept] = []
        for kept in self._kept:
            pair = [joined[-1].frame.event, kept.frame.event] if joined else []
            if pair and may(kept) and len(made := merge(pair)) == 1:
                frame = Frame(self.run_id, kept.frame.number, made[0])
                joined[-1] = _Kept(joined[-1].first, frame, _size(made[0]))
            else:
                joined.append(kept)
        self._keep(joined)

    def _drop(self, may: Callable[[_Kept], bool], *, whole: bool = True) -> None:
        """Drop the oldest until there is room, but never the run's start or end."""
        dropped: set[Any] = set()
        left, size = len(self._kept), self._bytes
        rest = []
        for kept in self._kept:
            full = left > self.max_events * _ROOM or size > self.max_bytes * _ROOM
            frame, part = kept.frame, whole and kept.unit in dropped
            is_edge = frame.number == 1 or frame.is_last
            if not is_edge and (part or (full and may(kept))):
                left, size = left - 1, size - kept.size
                if kept.unit is not None:
                    dropped.add(kept.unit)
            else:
                rest.append(kept)
        self._keep(rest)

    def _keep(self, kept: list[_Kept]) -> None:
        self._kept = kept
        self._bytes = sum(each.size for each in kept)


def _size(event: Event) -> int:
    return len(json.dumps(event))


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

    A listener that falls behind loses its queue and is told that it lags, so that it
    takes a fresh start: memory stays bounded whatever a slow socket does.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.lagging = False
        # The run that it has heard the start of, and the last frame that it took.
        self.open = OpenRun()
        self.last: Frame | None = None
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
            is_lost = frame.is_last
        else:
            is_lost = len(self._queue) >= self._room
            self._queue.append(frame)
        if is_lost:
            self.give_up()
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

    def restart(
        self, frames: list[Frame], told: OpenRun, *, missed_run: str | None = None
    ) -> None:
        """Replace the queue by what follows what was told.

        `missed_run` is going on but can't be told from its start: the listener is
        brought up to date at its end.
        """
        self.open = told
        self._queue = deque(frames)
        self._room = self.limit + len(frames)
        self._missed_run = missed_run
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
    place = [conversation.backend.alias, conversation.using, conversation.pk]
    parts = [*place, owner, key.session_id]
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
