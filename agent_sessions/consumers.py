"""The websocket end of a conversation: AG-UI events in TanStack's framing."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import uuid
from typing import TYPE_CHECKING, Any, ClassVar, cast

from channels.db import database_sync_to_async
from channels.exceptions import DenyConnection
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from django.db import DatabaseError

from agent_sessions.agui import (
    AbortRequest,
    FrameError,
    RunRequest,
    StreamOptions,
    SyncRequest,
    parse_frame,
    run_error,
)
from agent_sessions.backends.processes import this_process
from agent_sessions.exceptions import AgentSessionError, SessionDoesNotExist
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.ratelimit import RateLimit
from agent_sessions.runs import (
    Conversation,
    Frame,
    RunLimits,
    RunSetup,
    Subscription,
    get_run_manager,
)
from agent_sessions.runs.errors import message_for, refusal_code
from agent_sessions.runs.relay import ChannelRelay, group_of
from agent_sessions.websocket_auth import current_user, origin_is_allowed

if TYPE_CHECKING:
    from agents import Agent, RunConfig

logger = logging.getLogger("agent_sessions.consumers")

CLOSE_BAD_FRAMES = 4400
CLOSE_NOT_LOGGED_IN = 4401
CLOSE_FORBIDDEN = 4403
CLOSE_NOT_FOUND = 4404
CLOSE_TOO_LARGE = 4413
CLOSE_TOO_MANY = 4429
CLOSE_UNAVAILABLE = 4503


class AgentConsumer(AsyncWebsocketConsumer):
    """Run an agent on one conversation of the logged-in user.

    `AgentConsumer.as_asgi(agent=support_agent)` under a route with `session_id`.
    Override get_agent(), get_run_config(), get_context() and authorize(), each plain
    or async. Frames and close codes: docs/websocket.md.
    """

    agent: Agent[Any] | None = None
    backend: str = DEFAULT_ALIAS
    run_config: RunConfig | None = None
    stream_options: StreamOptions = StreamOptions()
    limits: RunLimits = RunLimits()
    # Whether to check the Origin header here; switch it off only where a middleware
    # around the consumer does, with hosts that ALLOWED_HOSTS lacks.
    validate_origin: bool = True
    # Bytes of a frame, sockets of one user and conversation in this process,
    # runs of one user a minute, seconds between pings.
    max_frame: int = 64 * 1024
    max_sockets: int = 5
    max_runs_per_minute: int = 20
    ping_interval: float = 25
    max_bad_frames: ClassVar[int] = 3

    def __init__(self, **options: Any) -> None:
        """Take what as_asgi() was given, as Django's View does with as_view()."""
        super().__init__()
        for name, value in options.items():
            if not hasattr(type(self), name) or name.startswith("_"):
                raise TypeError(
                    f"{type(self).__name__}.as_asgi() got {name!r}, which is no "
                    "attribute of the class."
                )
            setattr(self, name, value)

    # -- to override -----------------------------------------------------------------

    def get_agent(self) -> Any:
        """Choose the agent that this socket's runs begin with."""
        if self.agent is None:
            raise TypeError(
                "AgentConsumer has no agent. Give one, AgentConsumer.as_asgi("
                "agent=…), or override get_agent()."
            )
        return self.agent

    def get_run_config(self) -> Any:
        """Give the SDK's RunConfig for a run, or None."""
        return self.run_config

    def get_context(self) -> Any:
        """Give the context object that tools get; self.user is who asks."""
        return None

    def authorize(self, user: Any, session_id: str) -> Any:
        """Tell whether a user may talk to this agent; asked again before each run."""
        return True

    async def check_rate(self) -> bool:
        """Count a run; False where the user has had too many in this minute."""
        limit = RateLimit("runs", self.max_runs_per_minute)
        return await database_sync_to_async(limit.take)(self.user.pk)

    # -- connecting --------------------------------------------------------------------

    async def connect(self) -> None:
        """Accept, then close with a code where needed: only so a page learns why.

        A page of another origin alone is refused before that: it gets HTTP 403.
        """
        self.manager = get_run_manager()
        self.listener = Subscription()
        self._pumps: list[asyncio.Task[None]] = []
        self._bad_frames = 0
        self._in_group = False
        self.conversation: Conversation | None = None
        if self.validate_origin and not origin_is_allowed(
            cast("dict[str, Any]", self.scope)
        ):
            raise DenyConnection
        await self.accept()
        if not await self._admit():
            return
        self._start_relay()
        self._pumps = [
            asyncio.create_task(self._pump()),
            asyncio.create_task(self._ping()),
        ]

    async def disconnect(self, code: int) -> None:
        for pump in self._pumps:
            pump.cancel()
        if self.conversation is not None:
            self.manager.unsubscribe(self.conversation, self.listener)
            self.manager.leave_seat(self._seat)
            if self._in_group:
                await self.channel_layer.group_discard(
                    group_of(self.conversation), self.channel_name
                )

    async def _admit(self) -> bool:
        """Find the user and the conversation, or close with the reason's code."""
        if not await self._check_user():
            return False
        session_id = self.scope["url_route"]["kwargs"]["session_id"]
        try:
            self.conversation = await Conversation.find(
                session_id, user=self.user, backend=self.backend
            )
        except AgentSessionError as exc:
            if not isinstance(exc, SessionDoesNotExist | ValueError):
                raise
            await self.close(CLOSE_NOT_FOUND)
            return False
        self._seat = (self.user.pk, self.backend, self.conversation.pk)
        if not self.manager.take_seat(self._seat, self.max_sockets):
            self.conversation = None
            await self.close(CLOSE_TOO_MANY)
            return False
        return True

    async def _check_user(self) -> bool:
        """Look again who is there: people log out and are disabled meanwhile."""
        self.user = await current_user(
            cast("dict[str, Any]", self.scope), sessions[self.backend].threads
        )
        if self.user is None:
            await self.close(CLOSE_NOT_LOGGED_IN)
            return False
        session_id = self.scope["url_route"]["kwargs"]["session_id"]
        if not await _maybe_await(self.authorize(self.user, session_id)):
            await self.close(CLOSE_FORBIDDEN)
            return False
        return True

    def _start_relay(self) -> None:
        layer = get_channel_layer()
        if layer is not None and self.manager.relay is None:
            self.manager.relay = ChannelRelay(layer)

    # -- frames from the client ------------------------------------------------------

    async def receive(
        self, text_data: str | None = None, bytes_data: bytes | None = None
    ) -> None:
        """Answer one frame; nothing here waits for a run."""
        if self.conversation is None:
            return
        if _size(text_data, bytes_data) > self.max_frame:
            await self.close(CLOSE_TOO_LARGE)
            return
        try:
            if text_data is None:
                raise FrameError("bad_request", "Frames are text, not binary.")
            await self._answer(self.conversation, parse_frame(text_data))
        except FrameError as error:
            await self._refuse(error.code, error.run_id)
            await self._count_bad(error.code)

    async def _answer(
        self,
        conversation: Conversation,
        frame: RunRequest | AbortRequest | SyncRequest,
    ) -> None:
        if isinstance(frame, SyncRequest):
            try:
                await self._catch_up(frame.offset)
            except (AgentSessionError, DatabaseError) as exc:
                await self._give_up(exc)
        elif isinstance(frame, AbortRequest):
            here = self.manager.abort(conversation, frame.run_id, frame.mode)
            if not here and self.manager.relay is not None:
                self.manager.relay.abort(conversation, frame.run_id, frame.mode)
        else:
            await self._run(conversation, frame)

    async def _run(self, conversation: Conversation, request: RunRequest) -> None:
        if request.thread_id != conversation.session_id:
            raise FrameError(
                "bad_request", "threadId is not this socket's.", run_id=request.run_id
            )
        if not await self._check_user():
            return
        if not await self.check_rate():
            await self._refuse("rate_limited", request.run_id)
            return
        await self._join(conversation)
        try:
            run = await self.manager.start(conversation, request, await self._setup())
        except SessionDoesNotExist:
            await self.close(CLOSE_NOT_FOUND)
        except AgentSessionError as exc:
            code = refusal_code(exc)
            if code is None:
                raise
            if code == "internal":
                logger.error("Run %s can't start: %s", request.run_id, exc)
            await self._refuse(code, request.run_id)
        else:
            if run is None:
                # The id was used before: what it said is told again, not done again.
                await self._catch_up(f"{request.run_id}:0")
                return
            # Not before: a socket that has never synced would hear the middle of
            # another run. Not later: the run's task begins at the next await.
            self.manager.subscribe(conversation, self.listener)

    async def _setup(self) -> RunSetup:
        return RunSetup(
            agent=await _maybe_await(self.get_agent()),
            context=await _maybe_await(self.get_context()),
            run_config=await _maybe_await(self.get_run_config()),
            options=self.stream_options,
            limits=self.limits,
        )

    async def _catch_up(self, offset: str | None) -> None:
        if self.conversation is None:
            return
        await self._join(self.conversation)
        await self.manager.sync(
            self.conversation,
            self.listener,
            offset=offset,
            options=self.stream_options,
            stale_after=self.limits.stale_after,
        )

    async def _join(self, conversation: Conversation) -> None:
        """Listen to other processes, from the first sync or run frame on."""
        if not self._in_group and self.channel_layer is not None:
            self._in_group = True
            await self.channel_layer.group_add(
                group_of(conversation), self.channel_name
            )

    async def _refuse(self, code: str, run_id: str | None) -> None:
        """Tell this socket alone why its frame was refused."""
        event = run_error(code, message_for(code), run_id=run_id)
        await self._send({"id": f"refused:{uuid.uuid4().hex[:12]}", "chunk": event})

    async def _count_bad(self, code: str) -> None:
        self._bad_frames += code == "bad_request"
        if self._bad_frames >= self.max_bad_frames:
            await self.close(CLOSE_BAD_FRAMES)

    # -- messages from other processes -------------------------------------------------

    async def agent_sessions_frame(self, message: dict[str, Any]) -> None:
        """Hear what a run of another process said."""
        if message["origin"] != this_process():
            self.listener.put_remote(
                Frame(message["run_id"], message["number"], message["event"])
            )

    async def agent_sessions_abort(self, message: dict[str, Any]) -> None:
        """Stop a run of this process for a socket of another."""
        if self.conversation is not None:
            self.manager.abort(self.conversation, message["run_id"], message["mode"])

    # -- frames to the client ----------------------------------------------------------

    async def _pump(self) -> None:
        try:
            while True:
                frame = await self.listener.get()
                if frame is None:
                    await self._catch_up(None)
                else:
                    await self._send(frame.as_dict())
        except (AgentSessionError, DatabaseError) as exc:
            await self._give_up(exc)

    async def _give_up(self, exc: Exception) -> None:
        logger.warning("A socket could not be synced (%s)", type(exc).__name__)
        await self.close(CLOSE_UNAVAILABLE)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self.ping_interval)
            await self._send({"type": "ping"})

    async def _send(self, frame: dict[str, Any]) -> None:
        # ASCII escapes: a lone surrogate can't be sent in UTF-8.
        await self.send(text_data=json.dumps(frame, separators=(",", ":")))


def _size(text: str | None, data: bytes | None) -> int:
    return len(data or b"") + len((text or "").encode("utf-8", "surrogatepass"))


async def _maybe_await(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
