"""The websocket end of a conversation: AG-UI events in TanStack's framing."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from django.db import DatabaseError

from agent_sessions.agui import (
    AbortRequest,
    FrameError,
    RunRequest,
    StreamOptions,
    SyncRequest,
    links_images,
    parse_frame,
    run_error,
)
from agent_sessions.backends.leases import this_process
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidConsumer,
    SessionDoesNotExist,
    extra,
)
from agent_sessions.ratelimit import RateLimit
from agent_sessions.reports import guarded
from agent_sessions.runs import Conversation, Frame, RunLimits, RunSetup
from agent_sessions.runs.failures import log_failure, message_for, refusal_code
from agent_sessions.runs.log import ChannelRelay
from agent_sessions.runs.setup import DEFAULT_WINDOW, Blocked
from agent_sessions.sockets import (
    CLOSE_BAD_FRAMES,
    CLOSE_FORBIDDEN,
    CLOSE_NOT_FOUND,
    CLOSE_NOT_LOGGED_IN,
    CLOSE_TOO_LARGE,
    CLOSE_TOO_MANY,
    CLOSE_UNAVAILABLE,
    GuardedSocket,
    maybe_await,
)
from agent_sessions.windows import Window

with extra("channels", "channels", needed_by=__name__):
    from channels.db import database_sync_to_async
    from channels.layers import get_channel_layer

if TYPE_CHECKING:
    from agents import Agent, RunConfig, RunErrorHandlers, RunHooks

    from agent_sessions.runs.active import ActiveRun

__all__ = [
    "CLOSE_BAD_FRAMES",
    "CLOSE_FORBIDDEN",
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

    agent: Agent[Any] | None = None
    run_config: RunConfig | None = None
    hooks: RunHooks[Any] | None = None
    error_handlers: RunErrorHandlers[Any] | None = None
    # None leaves it to `limits`, and these to the SDK.
    max_turns: int | None = None
    stream_options: StreamOptions = StreamOptions()
    limits: RunLimits = RunLimits()
    # What of the history a model sees, where the RunConfig has no
    # session_input_callback: the newest turns. None sends and reads all of it.
    window: Window | None = DEFAULT_WINDOW
    # What becomes of a message whose turn a guardrail has blocked: "keep" leaves it in
    # the history, "redact" puts a note in its place, "remove" takes it out.
    blocked_messages: Blocked = "keep"
    # Bytes of a frame; runs of one user a minute.
    max_frame: int = 64 * 1024
    max_runs_per_minute: int = 20
    # Sync frames a minute, and as many abort frames, of one socket and of all of
    # a user's in this process.
    max_frames_per_minute: int = 20
    max_user_frames_per_minute: int = 60
    # Whether a user's message may name images by their address. Whoever runs the model
    # fetches them, and so learns of it, or reaches what the user can't.
    allow_image_urls: bool = False
    max_bad_frames: ClassVar[int] = 3
    # Frames in a row that are too many or too long.
    max_refused_frames: ClassVar[int] = 10

    _bad_frames = 0
    _refused_frames = 0
    # A run that was sent again while this socket is told another one.
    _asked_again = ""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See GuardedSocket; where nothing chooses an agent, it is refused too."""
        super().check_options(options)
        chosen = cls.get_agent is not AgentConsumer.get_agent or "get_agent" in options
        if not chosen and options.get("agent", cls.agent) is None:
            raise _without_agent(cls)
        agent = options.get("agent")
        if agent is not None and not hasattr(agent, "handoffs"):
            raise InvalidConsumer(
                f"{cls.__name__}.agent is an Agent, not {agent!r}. What chooses one goes "
                "into get_agent()."
            )
        action = options.get("blocked_messages", cls.blocked_messages)
        if action not in get_args(Blocked):
            raise InvalidConsumer(
                f"{cls.__name__}.blocked_messages is {action!r}. Give one of: "
                f"{', '.join(get_args(Blocked))}."
            )
        for name, kind in (("limits", RunLimits), ("stream_options", StreamOptions)):
            if not isinstance(value := options.get(name, kind()), kind):
                raise InvalidConsumer(
                    f"{cls.__name__}.{name} is a {kind.__name__}, not a "
                    f"{type(value).__name__}."
                )

    # -- to override -----------------------------------------------------------------

    def get_agent(self) -> Any:
        """Choose the agent that this socket's runs begin with."""
        if self.agent is None:
            raise _without_agent(type(self))
        return self.agent

    def get_run_config(self) -> Any:
        """Return the SDK's RunConfig for a run, or None."""
        return self.run_config

    def get_context(self) -> Any:
        """Return the context object that tools get; self.user is who asks."""
        return None

    def get_hooks(self) -> Any:
        """Return the SDK's RunHooks for a run, or None."""
        return self.hooks

    def get_error_handlers(self) -> Any:
        """Return the SDK's RunErrorHandlers for a run, or None."""
        return self.error_handlers

    def get_max_turns(self) -> Any:
        """Return how many turns a run may take; None leaves it to the limits."""
        return self.max_turns

    def get_session(self, session: Any) -> Any:
        """Return the session that a run uses: ours, which it gets, or one around it."""
        return session

    def on_error(self, run: ActiveRun, exc: Exception) -> Any:
        """Handle the failure of a run, for Sentry and the like; the client has its code.

        `run` has `run_id` and `conversation`. The socket may be gone by then. What
        this raises is logged and changes nothing.
        """

    async def check_rate(self) -> bool:
        """Count a run; False where the user has had too many in this minute."""
        limit = RateLimit("runs", self.max_runs_per_minute)
        return await database_sync_to_async(limit.take)(self.user.pk)

    def background(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Listen to other processes, and send their events to the client."""
        layer = get_channel_layer()
        if layer is not None and self.manager.relay is None:
            self.manager.relay = ChannelRelay(layer)
        return (self._pump(), self._look_elsewhere())

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
        frame: RunRequest | AbortRequest | SyncRequest,
    ) -> None:
        if isinstance(frame, RunRequest):
            await self._run(conversation, frame)
            return
        run_id = frame.run_id if isinstance(frame, AbortRequest) else None
        if not self._count(conversation, type(frame).__name__):
            raise FrameError("rate_limited", "Too many frames.", run_id=run_id)
        if isinstance(frame, SyncRequest):
            await self._catch_up(frame.offset)
        else:
            here = self.manager.abort(conversation, frame.run_id, frame.mode)
            if not here and self.manager.relay is not None:
                self.manager.relay.abort(conversation, frame.run_id, frame.mode)

    def _count(self, conversation: Conversation, kind: str) -> bool:
        """Count a frame of this socket and of all that its user has here."""
        counted = self._rates.take(
            kind, self.max_frames_per_minute
        ) and self.manager.rates.take(
            (self.user.pk, conversation.using, kind), self.max_user_frames_per_minute
        )
        if counted:
            self._refused_frames = 0
        return counted

    async def _run(self, conversation: Conversation, request: RunRequest) -> None:
        if request.thread_id != conversation.session_id:
            raise FrameError(
                "bad_request", "threadId is not this socket's.", run_id=request.run_id
            )
        if links_images(request) and not self.allow_image_urls:
            raise FrameError(
                "bad_request",
                "Images come as data; see allow_image_urls.",
                run_id=request.run_id,
            )
        try:
            if not await self.check_rate():
                await self._refuse("rate_limited", request.run_id)
                return
            self._refused_frames = 0
            await self._join(conversation)
            run = await self.manager.start(conversation, request, await self._setup())
        except SessionDoesNotExist:
            await self._end(CLOSE_NOT_FOUND)
        except Exception as exc:
            # Whatever a hook of the project raises is the run's error, not the socket's.
            code = refusal_code(exc)
            if code is None:
                await self._give_up(exc)
                return
            if code == "internal":
                log_failure(request.run_id, code, exc)
            await self._refuse(code, request.run_id)
        else:
            if run is None:
                # The id was used before: what it said is told again, not done again,
                # not where it is being told, and not within another run.
                if not self.listener.open.run_id:
                    await self._catch_up(f"{request.run_id}:0")
                elif self.listener.open.run_id != request.run_id:
                    self._asked_again = request.run_id
                return
            # Not before: a socket that has never synced would hear the middle of
            # another run. Not later: the run's task begins at the next await.
            self.manager.subscribe(conversation, self.listener)

    async def _setup(self) -> RunSetup:
        return RunSetup(
            agent=await maybe_await(self.get_agent()),
            context=await maybe_await(self.get_context()),
            run_config=await maybe_await(self.get_run_config()),
            options=self.stream_options,
            limits=self.limits,
            hooks=await maybe_await(self.get_hooks()),
            error_handlers=await maybe_await(self.get_error_handlers()),
            max_turns=await maybe_await(self.get_max_turns()),
            wrap_session=self.get_session,
            blocked_messages=self.blocked_messages,
            window=self.window,
            on_error=self.on_error,
        )

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

    @guarded
    async def agent_sessions_frame(self, message: dict[str, Any]) -> None:
        """Receive an event of another process's run."""
        if message["origin"] != this_process() and not self._over:
            self.listener.put_remote(
                Frame(message["run_id"], message["number"], message["event"])
            )

    async def agent_sessions_abort(self, message: dict[str, Any]) -> None:
        """Stop a run of this process for a socket of another."""
        if self.conversation is not None:
            self.manager.abort(self.conversation, message["run_id"], message["mode"])

    # -- frames to the client ----------------------------------------------------------

    @guarded
    async def _look_elsewhere(self) -> None:
        """Notice the end of another process's run where no channel layer tells of it."""
        while self.conversation is not None:
            await asyncio.sleep(self.recheck_interval)
            run_id, here = (
                self.listener.open.run_id,
                self.manager.active(self.conversation),
            )
            if not run_id or (here is not None and here.run_id == run_id):
                continue
            if not self.listener.is_idle:
                # The end may be on its way to a slow client.
                continue
            limit = self.limits.stale_after
            if not await self.manager.goes_on(self.conversation, run_id, limit):
                self.listener.give_up()

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


def _without_agent(kind: type[AgentConsumer]) -> InvalidConsumer:
    name = kind.__name__
    return InvalidConsumer(
        f"{name} has no agent. Give one, {name}.as_asgi(agent=…), or override "
        "get_agent()."
    )


def _size(text: str | None, data: bytes | None) -> int:
    return len(data or b"") + len((text or "").encode("utf-8", "surrogatepass"))
