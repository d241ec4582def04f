"""A websocket of one user and one conversation, which ends when the user may no more."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, cast
from urllib.parse import urlparse

from django.conf import settings
from django.http import HttpRequest, parse_cookie
from django.utils.translation import (
    get_language_from_request,
    override,
)

from agent_sessions.exceptions import (
    SessionDoesNotExist,
    StoreUnavailable,
    extra,
)
from agent_sessions.hooks import may_be_back, supported
from agent_sessions.mixins import AgentMixin
from agent_sessions.ratelimit import Rates
from agent_sessions.reports import guarded
from agent_sessions.runs import Conversation, Subscription, get_run_manager
from agent_sessions.runs.failures import in_words
from agent_sessions.runs.log import group_of
from agent_sessions.visitors import Visitor

with extra("channels", "channels", needed_by=__name__):
    from channels.exceptions import DenyConnection
    from channels.generic.websocket import AsyncWebsocketConsumer
    from channels.security.websocket import OriginValidator

logger = logging.getLogger("agent_sessions.consumers")

# 4000 and what HTTP says of the same.
CLOSE_BAD_FRAMES = 4400
CLOSE_NOT_LOGGED_IN = 4401
CLOSE_FORBIDDEN = 4403
CLOSE_NOT_FOUND = 4404
CLOSE_TOO_LARGE = 4413
CLOSE_TOO_MANY = 4429
CLOSE_INTERNAL = 4500
CLOSE_UNAVAILABLE = 4503
LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"]


class GuardedSocket(AgentMixin, AsyncWebsocketConsumer):
    """Admit a user, check repeatedly whether they may stay, and close if not.

    A subclass says in receive() and background() what the socket is for.
    """

    # Whether to check the Origin header here; switch it off only where a middleware
    # around the consumer does, with hosts that ALLOWED_HOSTS lacks.
    validate_origin: bool = True
    # Seconds between pings.
    ping_interval: float = 25

    def __init__(self, **options: Any) -> None:
        """Take what as_asgi() was given, as Django's View does with as_view()."""
        super().__init__()
        self._check_names(options, "as_asgi")
        for name, value in options.items():
            setattr(self, name, value)
        self.listener = Subscription()
        self.conversation: Conversation | None = None
        self.language: str | None = None
        self._checked = 0.0
        self._over = False
        self._in_group = False
        self._rates = Rates()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def as_asgi(cls, **options: Any) -> Any:
        """Return the application. Raises InvalidConsumer and InvalidBackend."""
        cls.check_options(options)
        return super().as_asgi(**options)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse misspelt names too."""
        if cls.__init__ is GuardedSocket.__init__:
            # One of a subclass may take other names, and passes these on.
            cls._check_names(options, "as_asgi")
        super().check_options(options)

    # -- to override -----------------------------------------------------------------

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
        self._visitor = Visitor(self.scope)
        if self.manager.is_closing:
            await self._end(CLOSE_UNAVAILABLE)
        elif await self._is_welcome():
            self.conversation = await self._find(self._session_id)
            self._sit_down(self.conversation)
            self.language = await supported(self.get_language, language_of(self.scope))
            work = (self._ping(), self._watch(), *self.background())
            self._tasks = [asyncio.create_task(self._keep_up(one)) for one in work]

    async def displace(self, *, shutting_down: bool = False) -> None:
        """Close: the user has opened too many others, or the process ends."""
        await self._end(CLOSE_UNAVAILABLE if shutting_down else CLOSE_TOO_MANY)

    async def _end(self, code: int) -> None:
        """Close with a code, after which nothing is heard, said or done."""
        if not self._over:
            self._over = True
            self._stop()
            await self.close(code)
            await self._let_go()

    async def _give_up(self, exc: Exception) -> None:
        """Close after an error."""
        comes_again = may_be_back(exc, "socket", logger)
        await self._end(CLOSE_UNAVAILABLE if comes_again else CLOSE_INTERNAL)

    def _stop(self) -> None:
        """End everything that goes on for this socket; the runs go on."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self.conversation is not None:
            self.manager.unsubscribe(self.conversation, self.listener)
        self.get_up()

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
            group, channel = group_of(conversation), self.channel_name
            try:
                await self.channel_layer.group_add(group, channel)
            except Exception as exc:
                # Its library has errors of its own.
                name = type(exc).__name__
                raise StoreUnavailable(f"The channel layer failed ({name}).") from None

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
            status = await self._objection(self._session_id, self.conversation)
        except Exception as exc:
            await self._give_up(exc)
            return False
        if status is not None:
            await self._end(4000 + status)
            return False
        self._checked = asked
        return not self._over

    def _read_user(self) -> Any:
        return self._visitor.read()

    # -- in the background -------------------------------------------------------------

    async def _keep_up(self, work: Coroutine[Any, Any, None]) -> None:
        """Work for the socket in a task; where that fails, the socket ends."""
        try:
            await work
        except SessionDoesNotExist:
            await self._end(CLOSE_NOT_FOUND)
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


def origin_is_allowed(scope: Mapping[str, Any]) -> bool:
    """Return whether a handshake comes from a page of ALLOWED_HOSTS, or from no page.

    Browsers send cookies along with any page's websocket and there is no CSRF token,
    so the Origin header is the defence; other programs send none, and no cookies of
    a victim either.
    """
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    if not origins:
        return True
    hosts = settings.ALLOWED_HOSTS or (LOCAL_HOSTS if settings.DEBUG else [])
    validator = OriginValidator(_nothing, hosts)
    try:
        parsed = [urlparse(origin.decode("latin1")) for origin in origins]
        return all(validator.valid_origin(origin) for origin in parsed)
    except ValueError:
        # No browser says "http://[": it is no address.
        return False


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Serve as the validator's app; only its matching of origins is used."""


def language_of(scope: Mapping[str, Any]) -> str:
    """Return the language of a handshake, as LocaleMiddleware chooses a request's."""
    request = HttpRequest()
    for name, value in scope["headers"]:
        if name == b"cookie":
            request.COOKIES |= parse_cookie(value.decode("latin1"))
        elif name == b"accept-language":
            request.META["HTTP_ACCEPT_LANGUAGE"] = value.decode("latin1")
    return get_language_from_request(request)
