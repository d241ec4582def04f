"""A websocket of one user and one conversation, which ends when the user may no more."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Coroutine, Hashable, Iterable, Mapping
from typing import Any, cast

from django.db import DatabaseError
from django.utils.translation import override

from agent_sessions.backends.options import (
    did_you_mean,
)
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidConsumer,
    SessionDoesNotExist,
    extra,
)
from agent_sessions.handler import ChatAlias, sessions
from agent_sessions.ratelimit import Rates
from agent_sessions.reports import guarded
from agent_sessions.runs import Conversation, Subscription, get_run_manager
from agent_sessions.runs.failures import in_words
from agent_sessions.runs.log import group_of
from agent_sessions.websocket_auth import SocketUser, language_of, origin_is_allowed

with extra("channels", "channels", needed_by=__name__):
    from channels.exceptions import DenyConnection
    from channels.generic.websocket import AsyncWebsocketConsumer

logger = logging.getLogger("agent_sessions.consumers")

CLOSE_BAD_FRAMES = 4400
CLOSE_NOT_LOGGED_IN = 4401
CLOSE_FORBIDDEN = 4403
CLOSE_NOT_FOUND = 4404
CLOSE_TOO_LARGE = 4413
CLOSE_TOO_MANY = 4429
CLOSE_UNAVAILABLE = 4503


class GuardedSocket(AsyncWebsocketConsumer):
    """Admit a user, check repeatedly whether they may stay, and close if not.

    A subclass says in receive() and background() what the socket is for.
    """

    # AGENT_SESSIONS_CHAT_BACKEND, else "default".
    backend: str = ChatAlias()  # type: ignore[assignment]
    # Whether to check the Origin header here; switch it off only where a middleware
    # around the consumer does, with hosts that ALLOWED_HOSTS lacks.
    validate_origin: bool = True
    # Sockets of one user in this process, of one conversation and of all.
    max_sockets: int = 5
    max_sockets_per_user: int = 20
    # Each frame asks anew who is there. So does what goes out when the answer is older
    # than so many seconds, and a timer when nothing happens.
    recheck_after: float = 5
    recheck_interval: float = 20
    # Seconds between pings.
    ping_interval: float = 25

    def __init__(self, **options: Any) -> None:
        """Take what as_asgi() was given, as Django's View does with as_view()."""
        super().__init__()
        self._check_names(options)
        for name, value in options.items():
            setattr(self, name, value)
        self.listener = Subscription()
        self.conversation: Conversation | None = None
        self.language: str | None = None
        self._checked = 0.0
        self._over = False
        self._in_group = False
        self._rates = Rates()
        self._seats: list[Hashable] = []
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def as_asgi(cls, **options: Any) -> Any:
        """Return the application. Raises InvalidConsumer and InvalidBackend."""
        cls.check_options(options)
        return super().as_asgi(**options)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse what as_asgi() is given, before there is a socket to fail.

        Raises InvalidConsumer and InvalidBackend.
        """
        if cls.__init__ is GuardedSocket.__init__:
            # One of a subclass may take other names, and passes these on.
            cls._check_names(options)
        backend = options.get("backend", cls.backend)
        if isinstance(backend, str) or "backend" in options:
            # Not a property, which each socket asks.
            sessions.expect(backend)

    @classmethod
    def _check_names(cls, options: Mapping[str, Any]) -> None:
        for name in options:
            if name.startswith("_") or not hasattr(cls, name):
                known = [each for each in dir(cls) if not each.startswith("_")]
                raise InvalidConsumer(
                    f"{cls.__name__}.as_asgi() got {name!r}, which is no attribute of "
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

    def get_language(self) -> Any:
        """Choose the language of the sentences that this socket gets."""
        return language_of(self.scope)

    def background(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Return what goes on as long as the socket is open."""
        return ()

    # -- the socket's life -------------------------------------------------------------

    @guarded
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve the socket; whatever ends it, its seats and tasks end with it."""
        self.manager = get_run_manager()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over = True
            await self._let_go()

    @guarded
    async def connect(self) -> None:
        """Accept, then close with a code where needed: only so a page learns why.

        A page of another origin alone is refused before that: it gets HTTP 403.
        """
        scope = cast("dict[str, Any]", self.scope)
        if self.validate_origin and not origin_is_allowed(scope):
            raise DenyConnection
        await self.accept()
        await self._keep_up(self._open())

    async def _open(self) -> None:
        self._visitor = SocketUser(self.scope)
        if await self._is_welcome() and await self._find():
            self._sit_down()
            self.language = await maybe_await(self.get_language())
            work = (self._ping(), self._watch(), *self.background())
            self._tasks = [asyncio.create_task(self._keep_up(one)) for one in work]

    async def _find(self) -> bool:
        """Find the conversation, or close."""
        try:
            self.conversation = await Conversation.find(
                self._session_id, user=self.user, backend=self.backend
            )
        except (AgentSessionError, DatabaseError) as exc:
            if isinstance(exc, SessionDoesNotExist | ValueError):
                await self._end(CLOSE_NOT_FOUND)
            else:
                await self._give_up(exc)
            return False
        return True

    def _sit_down(self) -> None:
        """Take a seat of each kind; close the user's oldest socket if none is free."""
        if self.conversation is None:
            return
        # Two databases may have users of the same primary key.
        user = self.user.pk, self.conversation.using
        place = self.backend, self.conversation.pk
        for seat, limit in (
            (user, self.max_sockets_per_user),
            ((*user, *place), self.max_sockets),
        ):
            self._seats.append(seat)
            self.manager.take_seat(seat, self, limit)

    async def displace(self) -> None:
        """Close, since the user has opened too many others."""
        await self._end(CLOSE_TOO_MANY)

    async def _end(self, code: int) -> None:
        """Close with a code, after which nothing is heard, said or done."""
        if not self._over:
            self._over = True
            self._stop()
            await self.close(code)
            await self._let_go()

    async def _give_up(self, exc: Exception) -> None:
        """Close after an error; only what the project's code raised needs a traceback."""
        if isinstance(exc, AgentSessionError | DatabaseError | OSError):
            logger.warning("A socket was closed (%s)", type(exc).__name__)
        else:
            logger.error("A socket broke (%s)", type(exc).__name__, exc_info=exc)
        await self._end(CLOSE_UNAVAILABLE)

    def _stop(self) -> None:
        """End everything that goes on for this socket; the runs go on."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self.conversation is not None:
            self.manager.unsubscribe(self.conversation, self.listener)
        while self._seats:
            self.manager.leave_seat(self._seats.pop(), self)

    async def _let_go(self) -> None:
        """Release everything, also of a frame that is being answered at the end."""
        self._stop()
        if self._in_group and self.conversation is not None:
            await self.channel_layer.group_discard(
                group_of(self.conversation), self.channel_name
            )
            self._in_group = False

    async def _join(self, conversation: Conversation) -> None:
        """Listen to other processes, from the first sync or run frame on."""
        if not self._in_group and self.channel_layer is not None:
            self._in_group = True
            await self.channel_layer.group_add(
                group_of(conversation), self.channel_name
            )

    # -- who is there ------------------------------------------------------------------

    @property
    def _session_id(self) -> str:
        session_id: str = self.scope["url_route"]["kwargs"]["session_id"]
        return session_id

    async def _is_welcome(self, within: float = 0) -> bool:
        """Return whether the user may stay; close the socket of one who may not.

        People log out, are disabled and lose their sessions meanwhile. An answer counts
        for `within` seconds.
        """
        asked = time.monotonic()
        if self._over or asked - self._checked < within:
            return not self._over
        try:
            code = await self._objection()
        except Exception as exc:
            await self._give_up(exc)
            return False
        if code is not None:
            await self._end(code)
            return False
        self._checked = asked
        return not self._over

    async def _objection(self) -> int | None:
        """Return the close code for one who may not stay; None where all is well."""
        conversation = self.conversation

        def look() -> tuple[Any, bool]:
            user = self._visitor.read()
            is_there = user is None or conversation is None or conversation.exists()
            return user, is_there

        user, is_there = await sessions[self.backend].threads.run(look)
        if user is None:
            return CLOSE_NOT_LOGGED_IN
        self.user = user
        if not await maybe_await(self.authorize(user, self._session_id)):
            return CLOSE_FORBIDDEN
        return None if is_there else CLOSE_NOT_FOUND

    # -- in the background -------------------------------------------------------------

    async def _keep_up(self, work: Coroutine[Any, Any, None]) -> None:
        """Work for the socket in a task; where that fails, the socket ends."""
        try:
            await work
        except Exception as exc:
            await self._give_up(exc)

    async def _watch(self) -> None:
        """Close the socket of one who may not stay, though nothing is sent."""
        while not self._over:
            wait = self._checked + self.recheck_interval - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                await self._is_welcome()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self.ping_interval)
            await self._send({"type": "ping"})

    async def _send(self, frame: dict[str, Any]) -> None:
        if self._over:
            return
        if event := frame.get("chunk"):
            with override(self.language):
                frame = {**frame, "chunk": in_words(event)}
        # ASCII escapes: a lone surrogate can't be sent in UTF-8.
        await self.send(text_data=json.dumps(frame, separators=(",", ":")))


async def maybe_await(value: Any) -> Any:
    """Return what a hook gives, be it plain or async."""
    return await value if inspect.isawaitable(value) else value
