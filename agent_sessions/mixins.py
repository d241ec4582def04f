"""What a project says of its agent, for each door that people talk to it through."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, get_args

from asgiref.sync import sync_to_async
from django.db import close_old_connections

from agent_sessions.agui import (
    AbortRequest,
    FrameError,
    RunRequest,
    StreamOptions,
    SwitchRequest,
    links_images,
)
from agent_sessions.backends.options import did_you_mean
from agent_sessions.exceptions import InvalidConsumer, SessionDoesNotExist
from agent_sessions.handler import ChatAlias, sessions
from agent_sessions.hooks import HookFailed, ask, is_granted
from agent_sessions.ratelimit import RateLimit
from agent_sessions.runs import (
    Conversation,
    RunLimits,
    RunSetup,
    get_run_manager,
)
from agent_sessions.runs.failures import log_failure, refusal_code
from agent_sessions.runs.forking import switch
from agent_sessions.runs.log import ChannelRelay
from agent_sessions.runs.setup import DEFAULT_WINDOW, Blocked
from agent_sessions.windows import Window
from agent_sessions.workers import WorkerMixin

if TYPE_CHECKING:
    from agents import RunConfig, RunErrorHandlers, RunHooks

    from agent_sessions.runs.active import ActiveRun


class AgentMixin(WorkerMixin):
    """The options and methods that AgentConsumer and its like share.

    Override get_agent(), get_context(), get_session(), authorize(), on_error() and the
    other get_…(), each plain or async.
    """

    # AGENT_SESSIONS_CHAT_BACKEND, else "default".
    backend: str = ChatAlias()  # type: ignore[assignment]
    run_config: RunConfig | None = None
    hooks: RunHooks[Any] | None = None
    error_handlers: RunErrorHandlers[Any] | None = None
    # None leaves it to `limits`, and these to the SDK.
    max_turns: int | None = None
    # What of the history a model sees, where the RunConfig has no
    # session_input_callback: the newest turns. None sends and reads all of it.
    window: Window | None = DEFAULT_WINDOW
    # What becomes of a message whose turn a guardrail has blocked: "keep" leaves it in
    # the history, "redact" puts a note in its place, "remove" takes it out.
    blocked_messages: Blocked = "keep"
    # Whether a user's message may name images by their address. Whoever runs the model
    # fetches them, and so learns of it, or reaches what the user can't.
    allow_image_urls: bool = False
    # Runs of one user.
    max_runs_per_minute: int = 20
    # Requests of all connections of a user in this process: those for what was said,
    # and as many to stop a run.
    max_user_frames_per_minute: int = 60
    # Connections of one user in this process, of one conversation and of all.
    max_sockets: int = 5
    max_sockets_per_user: int = 20
    # What goes out asks anew who is there when the answer is older than so many
    # seconds, and so does a timer when nothing happens.
    recheck_after: float = 5
    recheck_interval: float = 20

    _seats: tuple[Hashable, ...] = ()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that would fail once somebody is there.

        Raises InvalidConsumer and InvalidBackend.
        """
        backend = options.get("backend", cls.backend)
        if isinstance(backend, str) or "backend" in options:
            # Not a property, which each connection asks.
            sessions.expect(backend)
        chosen = cls.get_agent is not AgentMixin.get_agent or "get_agent" in options
        if not chosen and options.get("agent", cls.agent) is None:
            raise _without_agent(cls)
        cls._check_place(options)
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

    @classmethod
    def _check_names(cls, options: Mapping[str, Any], given_to: str) -> None:
        for name in options:
            if name.startswith("_") or not hasattr(cls, name):
                known = [each for each in dir(cls) if not each.startswith("_")]
                raise InvalidConsumer(
                    f"{cls.__name__}.{given_to}() got {name!r}, which is no attribute of "
                    f"the class. {did_you_mean([name], known)}Give it what "
                    "docs/websocket.md names, or add the attribute to the class."
                )
            if inspect.isroutine(getattr(cls, name)) and not callable(options[name]):
                raise InvalidConsumer(
                    f"{cls.__name__}.{name}() is a method. Give a function in its place, "
                    f"not a {type(options[name]).__name__}."
                )

    # -- to override -----------------------------------------------------------------

    def authorize(self, user: Any, session_id: str) -> Any:
        """Return whether a user may talk to this agent; asked again and again."""
        return True

    def get_agent(self) -> Any:
        """Choose the agent that runs begin with."""
        if self.agent is None:
            raise _without_agent(type(self))
        if isinstance(self.agent, str):
            return self._named_agent(self.agent)
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

        `run` has `run_id` and `conversation`. Whoever asked may be gone by then. What
        this raises is logged and changes nothing.
        """

    @asynccontextmanager
    async def open_run(
        self, request: RunRequest
    ) -> AsyncIterator[Mapping[str, Any] | None]:
        """Open what a run needs before `yield`, and close it after: MCP servers, clients.

        It is called in the run's own task, once the run is accepted. What it yields, a
        dict of agent, context, run_config, hooks, error_handlers or max_turns, takes
        the place of what the get_…() returned.
        """
        yield None

    async def check_rate(self) -> bool:
        """Count a run; False where the user has had too many in this minute."""
        limit = RateLimit("runs", self.max_runs_per_minute)

        def take() -> bool:
            # The cache may be a database's.
            close_old_connections()
            try:
                return limit.take(self.user.pk)
            finally:
                close_old_connections()

        return await sync_to_async(take)()

    # -- who is there ------------------------------------------------------------------

    def _read_user(self) -> Any:
        """Return the user who is there now, or None; it queries the database."""
        raise NotImplementedError

    async def _objection(
        self, session_id: str, conversation: Conversation | None
    ) -> int | None:
        """Return the HTTP status for one who may not stay; None where all is well.

        self.user is the one who is there.
        """

        def look() -> tuple[Any, bool]:
            user = self._read_user()
            is_there = user is None or conversation is None or conversation.exists()
            return user, is_there

        user, is_there = await sessions[self.backend].threads.run(look)
        if user is None:
            return 401
        self.user = user
        if not await is_granted(self.authorize, user, session_id):
            return 403
        return None if is_there else 404

    async def _find(self, session_id: str) -> Conversation:
        """Find the user's own session. Raise SessionDoesNotExist for any other id."""
        try:
            return await Conversation.find(
                session_id, user=self.user, backend=self.backend
            )
        except ValueError:
            # No id at all.
            raise SessionDoesNotExist(session_id) from None

    def _sit_down(self, conversation: Conversation) -> None:
        """Take a seat of each kind; displace the user's oldest if none is free."""
        user = self._known_as(conversation)
        place = (*user, self.backend, conversation.pk)
        # The conversation's first: whoever goes there makes room among all.
        self._seats = place, user
        limits = self.max_sockets, self.max_sockets_per_user
        for seat, limit in zip(self._seats, limits, strict=True):
            get_run_manager().seats.take(seat, self, limit)

    def get_up(self) -> None:
        """Leave the seats."""
        seats, self._seats = self._seats, ()
        for seat in seats:
            get_run_manager().seats.leave(seat, self)

    async def displace(self, *, shutting_down: bool = False) -> None:
        """Make room, since the user has opened too many others."""
        raise NotImplementedError

    def _count(self, conversation: Conversation, kind: str) -> bool:
        """Count a request of all that a user has in this process; False if too many."""
        return get_run_manager().rates.take(
            (*self._known_as(conversation), kind), self.max_user_frames_per_minute
        )

    def _known_as(self, conversation: Conversation) -> tuple[Any, str, str]:
        """Name the user in this process: tenants may have users of the same key."""
        return self.user.pk, conversation.using, conversation.table

    # -- runs --------------------------------------------------------------------------

    async def _check_run(self, conversation: Conversation, request: RunRequest) -> None:
        """Raise FrameError if a run may not start, and count it if it may."""
        run_id = request.run_id
        _check_thread(conversation, request)
        if links_images(request) and not self.allow_image_urls:
            words = "Images come as data; see allow_image_urls."
            raise FrameError("bad_request", words, run_id=run_id)
        with _refusals(run_id):
            if not await ask(self.check_rate):
                raise FrameError("rate_limited", "Too many runs.", run_id=run_id)

    async def _switch(self, conversation: Conversation, request: SwitchRequest) -> None:
        """Go on with another branch. Raise FrameError where that is refused."""
        _check_thread(conversation, request)
        if not self._count(conversation, SwitchRequest.__name__):
            raise FrameError("rate_limited", "Too many.", run_id=request.run_id)
        run, branch = conversation.backend.threads.run, request.branch
        with _refusals(request.run_id):
            await run(switch, conversation, branch, self.limits.stale_after)
        get_run_manager().nudge(conversation)

    async def _start_run(self, conversation: Conversation, request: RunRequest) -> bool:
        """Start a run, or queue it for a worker; False where its id was used before.

        Raises FrameError where it is refused, SessionDoesNotExist, and what says that a
        store or a database is away.
        """
        with _refusals(request.run_id):
            if self.where == "task":
                return await self._enqueue(conversation, request)
            setup, start = await self._setup(), get_run_manager().start
            return await start(conversation, request, setup) is not None

    async def _stop_run(
        self, conversation: Conversation, request: AbortRequest
    ) -> bool:
        """Stop a run, wherever it is; return False where it doesn't go on."""
        return await get_run_manager().stop(
            conversation,
            request.run_id,
            request.mode,
            stale_after=self.limits.stale_after,
        )

    def _use_channel_layer(self) -> None:
        """Nudge other processes, where there is a layer."""
        manager = get_run_manager()
        if manager.relay is None and (layer := _channel_layer()) is not None:
            manager.relay = ChannelRelay(layer)

    async def setup_for(self, user: Any, conversation: Conversation) -> RunSetup | None:
        """Return the setup of a run in a worker; None where the user may not ask."""
        self.user, self.conversation = user, conversation
        if not await is_granted(self.authorize, user, conversation.session_id):
            return None
        self._use_channel_layer()
        return await self._setup()

    async def _setup(self) -> RunSetup:
        return RunSetup(
            agent=await ask(self.get_agent),
            context=await ask(self.get_context),
            run_config=await ask(self.get_run_config),
            options=self.stream_options,
            limits=self.limits,
            hooks=await ask(self.get_hooks),
            error_handlers=await ask(self.get_error_handlers),
            max_turns=await ask(self.get_max_turns),
            wrap_session=self.get_session,
            blocked_messages=self.blocked_messages,
            window=self.window,
            on_error=self.on_error,
            open_run=self.open_run if self._opens_runs() else None,
        )

    def _opens_runs(self) -> bool:
        own = getattr(self.open_run, "__func__", self.open_run)
        return own is not AgentMixin.open_run


def _check_thread(
    conversation: Conversation, request: RunRequest | SwitchRequest
) -> None:
    if request.thread_id != conversation.session_id:
        words = "threadId is another session's."
        raise FrameError("bad_request", words, run_id=request.run_id)


@contextmanager
def _refusals(run_id: str) -> Iterator[None]:
    """Turn what refuses a run into FrameError.

    Whatever a hook of the project raises is the run's error, not its connection's.
    """
    try:
        yield
    except (FrameError, SessionDoesNotExist):
        raise
    except Exception as exc:
        code = refusal_code(exc)
        if code is None:
            raise
        if isinstance(exc, HookFailed):
            exc = exc.error
        if code == "internal":
            log_failure(run_id, code, exc)
        raise FrameError(code, type(exc).__name__, run_id=run_id) from None


def _channel_layer() -> Any:
    """Return the channel layer, or None without one or without Channels."""
    try:
        from channels.layers import get_channel_layer
    except ImportError:
        return None
    return get_channel_layer()


def _without_agent(kind: type[AgentMixin]) -> InvalidConsumer:
    name, given_to = kind.__name__, "as_asgi" if hasattr(kind, "as_asgi") else "as_view"
    return InvalidConsumer(
        f"{name} has no agent. Give one, {name}.{given_to}(agent=…), or override "
        "get_agent()."
    )
