"""The websocket end of a conversation: AG-UI events in TanStack's framing."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any, ClassVar

from django.db import DatabaseError

from agent_sessions.agui import (
    AbortRequest,
    AnyRequest,
    FrameError,
    RunRequest,
    SwitchRequest,
    SyncRequest,
    parse_frame,
    run_error,
)
from agent_sessions.backends.leases import this_process
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.reports import guarded
from agent_sessions.runs import Conversation
from agent_sessions.runs.failures import message_for
from agent_sessions.sockets import (
    CLOSE_BAD_FRAMES,
    CLOSE_FORBIDDEN,
    CLOSE_INTERNAL,
    CLOSE_NOT_FOUND,
    CLOSE_NOT_LOGGED_IN,
    CLOSE_TOO_LARGE,
    CLOSE_TOO_MANY,
    CLOSE_UNAVAILABLE,
    GuardedSocket,
)

__all__ = [
    "CLOSE_BAD_FRAMES",
    "CLOSE_FORBIDDEN",
    "CLOSE_INTERNAL",
    "CLOSE_NOT_FOUND",
    "CLOSE_NOT_LOGGED_IN",
    "CLOSE_TOO_LARGE",
    "CLOSE_TOO_MANY",
    "CLOSE_UNAVAILABLE",
    "AgentConsumer",
]

logger = logging.getLogger("agent_sessions.consumers")


class AgentConsumer(GuardedSocket):
    """Run an agent on one conversation of the logged-in user.

    `AgentConsumer.as_asgi(agent=support_agent)` under a route with `session_id`.
    Override get_agent(), get_context(), get_session(), authorize(),
    on_error() and the other get_…(), each plain or async. Frames and close codes: docs/websocket.md.
    """

    # Bytes of a frame.
    max_frame: int = 64 * 1024
    # Sync frames a minute, and as many abort frames, of one socket.
    max_frames_per_minute: int = 20
    max_bad_frames: ClassVar[int] = 3
    # Frames in a row that are too many or too long.
    max_refused_frames: ClassVar[int] = 10

    _bad_frames = 0
    _refused_frames = 0
    _has_synced = False
    # A run that was sent again while this socket is told another one.
    _asked_again = ""

    def background(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Listen to other processes, and send their events to the client."""
        self._use_channel_layer()
        return (self._pump(),)

    # -- frames from the client ------------------------------------------------------

    @guarded
    async def receive(
        self, text_data: str | None = None, bytes_data: bytes | None = None
    ) -> None:
        """Answer one frame; nothing here waits for a run."""
        conversation = self.conversation
        # Before anything is read, whatever it is: who may not stay stops nothing.
        if conversation is not None and await self._is_welcome():
            await self._keep_up(self._read(conversation, text_data, bytes_data))
        if self._over:
            await self._let_go()

    async def _read(
        self, conversation: Conversation, text: str | None, data: bytes | None
    ) -> None:
        if _size(text, data) > self.max_frame:
            await self._end(CLOSE_TOO_LARGE)
            return
        try:
            if text is None:
                raise FrameError("bad_request", "Frames are text, not binary.")
            await self._answer(conversation, parse_frame(text))
        except FrameError as error:
            await self._refuse(error.code, error.run_id)

    async def _answer(
        self,
        conversation: Conversation,
        frame: AnyRequest,
    ) -> None:
        if isinstance(frame, RunRequest):
            await self._run(conversation, frame)
            return
        if isinstance(frame, SwitchRequest):
            await self._join(conversation)
            await self._switch(conversation, frame)
            # The answer ends what it is told, and shows the branch.
            self.listener.give_up()
            return
        run_id = frame.run_id if isinstance(frame, AbortRequest) else None
        if not self._count(conversation, type(frame).__name__):
            raise FrameError("rate_limited", "Too many frames.", run_id=run_id)
        if isinstance(frame, SyncRequest):
            await self._catch_up(frame.offset)
        else:
            await self._stop_there(conversation, frame)

    async def _stop_there(
        self, conversation: Conversation, frame: AbortRequest
    ) -> None:
        try:
            goes_on = await self._stop_run(conversation, frame)
        except (AgentSessionError, DatabaseError) as exc:
            await self._give_up(exc)
            return
        if not goes_on and self.listener.open.run_id == frame.run_id:
            # It has ended; the rows tell how.
            self.listener.give_up()

    def _count(self, conversation: Conversation, kind: str) -> bool:
        """Count a frame of this socket and of all that its user has here."""
        counted = self._rates.take(kind, self.max_frames_per_minute)
        counted = counted and super()._count(conversation, kind)
        if counted:
            self._refused_frames = 0
        return counted

    async def _run(self, conversation: Conversation, request: RunRequest) -> None:
        await self._check_run(conversation, request)
        self._refused_frames = 0
        await self._join(conversation)
        if await self._start_run(conversation, request):
            if self.where == "task":
                # Those who have synced hear it by its rows, as all runs of others.
                if not self._has_synced:
                    await self._catch_up(f"{request.run_id}:0")
                return
            # Not before: a socket that has never synced would hear the middle of
            # another run. Not later: the run's task begins at the next await.
            self.manager.subscribe(conversation, self.listener)
        # The id was used before: what it said is told again, not done again, not where
        # it is being told, and not within another run.
        elif not self.listener.open.run_id:
            await self._catch_up(f"{request.run_id}:0")
        elif self.listener.open.run_id != request.run_id:
            self._asked_again = request.run_id

    async def _catch_up(self, offset: str | None, *, begins: bool = True) -> None:
        if self.conversation is None:
            return
        await self._join(self.conversation)
        try:
            await self.manager.sync(
                self.conversation,
                self.listener,
                offset=offset,
                options=self.stream_options,
                stale_after=self.limits.stale_after,
                begins=begins,
            )
            self._has_synced = True
        except (AgentSessionError, DatabaseError) as exc:
            await self._give_up(exc)

    async def _refuse(self, code: str, run_id: str | None) -> None:
        """Send to this socket alone why its frame was refused."""
        event = run_error(code, message_for(code), run_id=run_id)
        await self._send({"id": f"refused:{uuid.uuid4().hex[:12]}", "chunk": event})
        self._bad_frames += code == "bad_request"
        self._refused_frames += code in {"rate_limited", "message_too_long"}
        if self._bad_frames >= self.max_bad_frames:
            await self._end(CLOSE_BAD_FRAMES)
        elif self._refused_frames >= self.max_refused_frames:
            await self._end(CLOSE_TOO_MANY)

    # -- messages from other processes -------------------------------------------------

    async def agent_sessions_nudge(self, message: dict[str, Any]) -> None:
        """Look at the rows: a run of another process has told something, or is to stop."""
        if message["origin"] != this_process() and not self._over:
            self.manager.watcher.wake()

    # -- frames to the client ----------------------------------------------------------

    @guarded
    async def _pump(self) -> None:
        while self.conversation is not None:
            frame = await self.listener.get()
            if not await self._is_welcome(within=self.recheck_after):
                return
            if frame is None:
                last = self.listener.last if self.listener.open.run_id else None
                await self._catch_up(last.id if last else None, begins=False)
                continue
            await self._send(frame.as_dict())
            if frame.is_last and self._asked_again:
                run_id, self._asked_again = self._asked_again, ""
                await self._catch_up(f"{run_id}:0")


def _size(text: str | None, data: bytes | None) -> int:
    return len(data or b"") + len((text or "").encode("utf-8", "surrogatepass"))
