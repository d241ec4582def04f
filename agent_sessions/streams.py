"""The HTTP end of a conversation: AG-UI events as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ImproperlyConfigured, RequestDataTooBig
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, connections, transaction
from django.http import (
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.http.request import RawPostDataException, UnreadablePostError
from django.http.response import HttpResponseBase
from django.urls import URLPattern, path
from django.utils.translation import get_language_from_request, override
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from agent_sessions.agui import (
    AbortRequest,
    FrameError,
    RunRequest,
    SwitchRequest,
    SyncRequest,
    capabilities,
    parse_frame,
    parse_request,
    run_error,
    run_started,
)
from agent_sessions.exceptions import AgentSessionError, SessionDoesNotExist
from agent_sessions.hooks import HookFailed, ask, may_be_back, supported
from agent_sessions.mixins import AgentMixin
from agent_sessions.reports import guarded
from agent_sessions.runs import Conversation, Subscription, get_run_manager
from agent_sessions.runs.failures import in_words, message_for, refusal
from agent_sessions.visitors import Visitor, objection_of_csrf, scope_of

logger = logging.getLogger("agent_sessions.streams")

# What ends a stream before its run, beside the status that HTTP has for the same.
CODES = {
    400: "bad_request",
    401: "not_logged_in",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    429: "rate_limited",
    500: "internal",
    503: "unavailable",
}
HEADERS = {
    "Cache-Control": "private, no-store, no-transform",
    # nginx passes events on at once, and GZipMiddleware doesn't collect them.
    "X-Accel-Buffering": "no",
    "Content-Encoding": "identity",
}


class AgentRunView(AgentMixin, View):
    """Run an agent on a conversation of the logged-in user, over HTTP.

    `include(AgentRunView.as_urls(agent=support_agent))` under a route with
    `session_id`. Override what AgentConsumer has, and get_token_user().
    Requests, answers and errors: docs/server-sent-events.md.
    """

    # No HEAD: its answer would have no body, and so no end.
    http_method_names = ["get", "post", "options"]
    # Seconds of silence after which a comment tells proxies that the stream lives.
    comment_interval: float = 15

    _checked = 0.0
    _has_token = False
    # Why the stream ends before its run: a status of HTTP.
    _ended_by: int | None = None

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:
        """Return the view. Raises InvalidConsumer and InvalidBackend."""
        cls._check_names(initkwargs, "as_view")
        cls.check_options(initkwargs)
        view: Any = super().as_view(**initkwargs)
        for alias in connections:
            # Django refuses async views in a transaction of the request.
            view = transaction.non_atomic_requests(using=alias)(view)
        # LoginRequiredMiddleware would redirect to a page. CSRF is checked here, where
        # a token doesn't make it unnecessary.
        return cast(
            "Callable[..., HttpResponseBase]", login_not_required(csrf_exempt(view))
        )

    @classmethod
    def as_urls(cls, **initkwargs: Any) -> list[URLPattern]:
        """Return the routes of runs, for include() below a conversation's address."""
        view = cls.as_view(**initkwargs)
        return [
            path("runs/", view, name="agent-runs"),
            path("runs/<path:run_id>/stop/", view, name="agent-stop"),
            path("events/", view, {"reads": "events"}, "agent-events"),
            path(
                "capabilities/", view, {"reads": "capabilities"}, "agent-capabilities"
            ),
        ]

    # -- to override -----------------------------------------------------------------

    def get_token_user(self, request: HttpRequest) -> Any:
        """Return the user whom a token of the request names, plain or async.

        None leaves it to the Django session, whose requests need a CSRF token. It is
        asked again while a stream is open.
        """
        return None

    def get_language(self) -> Any:
        """Choose the language of the sentences in a stream."""
        return get_language_from_request(self.request)

    def get_capabilities(self, agent: Any) -> Any:
        """Return AG-UI's AgentCapabilities."""
        return capabilities(agent, self.stream_options)

    # -- requests ----------------------------------------------------------------------

    @guarded
    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        """Answer a request; no cache may keep the answer."""
        if not isinstance(request, ASGIRequest):
            raise ImproperlyConfigured(
                f"{type(self).__name__} needs an ASGI server, such as uvicorn, daphne or "
                "granian: under WSGI a run would end with its request. Serve "
                "get_asgi_application()."
            )
        response = await self._answer(request, *args, **kwargs)
        response.setdefault("Cache-Control", "private, no-store")
        return response

    async def _answer(
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        session_id = kwargs["session_id"]
        try:
            user = await ask(self.get_token_user, request)
            self._has_token = user is not None
            scope = {"user": user} if self._has_token else scope_of(request)
            self._visitor = Visitor(scope)
            if not self._has_token and (page := await objection_of_csrf(request)):
                return page
            if (status := await self._objection(session_id, None)) is not None:
                return await self._error(status)
            self._checked = time.monotonic()
            self.conversation = await self._find(session_id)
            response: HttpResponseBase = await super().dispatch(  # type: ignore[misc]
                request, *args, **kwargs
            )
            return response
        except SessionDoesNotExist:
            return await self._error(404)
        except HookFailed as exc:
            name, error = type(exc.error).__name__, exc.error
            logger.error("A request failed (%s)", name, exc_info=error)
            return await self._error(500)
        except (AgentSessionError, DatabaseError) as exc:
            logger.warning("A request was refused (%s)", type(exc).__name__)
            return await self._error(503)

    async def http_method_not_allowed(  # type: ignore[override]
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        """Answer 405 as JSON."""
        response = await super().http_method_not_allowed(request, *args, **kwargs)  # type: ignore[misc]
        return await self._error(405, Allow=response["Allow"])

    async def post(self, request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
        """Start a run and stream it, or stop one."""
        if "reads" in kwargs:
            return await self._error(405, Allow="GET")
        if "run_id" in kwargs:
            return await self._stop(request, kwargs["run_id"])
        conversation = self.conversation
        try:
            asked = _read(request)
            self._use_channel_layer()
            if isinstance(asked, SwitchRequest):
                await self._switch(conversation, asked)
                return await self._streamed(self._events(None))
            await self._check_run(conversation, asked)
            await self._start_run(conversation, asked)
        except RequestDataTooBig:
            return await self._error(413)
        except FrameError as error:
            return await self._refused(error)
        # An id that was used before is told again, not run again.
        return await self._streamed(self._events(f"{asked.run_id}:0"))

    async def get(
        self, request: HttpRequest, *, reads: str = "events", **kwargs: Any
    ) -> HttpResponseBase:
        """Stream what came after an offset, to the end of the run; starts nothing."""
        if "run_id" in kwargs:
            return await self._error(405, Allow="POST")
        if reads == "capabilities":
            agent = await ask(self.get_agent)
            return JsonResponse(await ask(self.get_capabilities, agent))
        if not self._count(self.conversation, SyncRequest.__name__):
            return await self._error(429)
        # The header is newer: a browser sends it when it connects again.
        offset = _header(request, "Last-Event-ID") or request.GET.get("offset") or None
        if offset is not None and await self._has_heard_all(offset):
            # So that a browser's EventSource doesn't come again.
            return HttpResponse(status=204)
        return await self._streamed(self._events(offset))

    async def _stop(self, request: HttpRequest, run_id: str) -> HttpResponseBase:
        if not self._count(self.conversation, AbortRequest.__name__):
            return await self._error(429)
        try:
            given = json.loads(request.body or b"{}")
            mode = given.get("mode") if isinstance(given, dict) else ""
            asked = parse_request({"type": "abort", "runId": run_id, "mode": mode})
        except (ValueError, RecursionError, FrameError, RequestDataTooBig):
            return await self._error(400)
        if isinstance(asked, AbortRequest) and await self._stop_run(
            self.conversation, asked
        ):
            return JsonResponse({}, status=202)
        return await self._error(404)

    # -- streams -----------------------------------------------------------------------

    async def _streamed(self, events: AsyncIterator[str]) -> StreamingHttpResponse:
        self._language = await self._read_language()
        return StreamingHttpResponse(
            events, content_type="text/event-stream", headers=HEADERS
        )

    async def _read_language(self) -> str:
        default = get_language_from_request(self.request)
        if not hasattr(self, "user"):
            return default
        return await supported(self.get_language, default)

    async def _error(self, status: int, **headers: str) -> JsonResponse:
        if status == 429:
            headers = {"Retry-After": "60"}
        return refusal(CODES[status], status, await self._read_language(), headers)

    async def _refused(self, error: FrameError) -> HttpResponseBase:
        """Answer with a run that fails at once, as a client of AG-UI expects it."""
        run_id = error.run_id or f"refused:{uuid.uuid4().hex[:12]}"

        async def events() -> AsyncIterator[str]:
            yield self._written(run_started(self.conversation.session_id, run_id))
            failed = run_error(error.code, message_for(error.code), run_id=run_id)
            yield self._written(failed)

        return await self._streamed(events())

    async def _has_heard_all(self, offset: str) -> bool:
        listener = Subscription()
        try:
            await self._catch_up(listener, offset)
            return listener.is_idle and not listener.open.run_id
        finally:
            get_run_manager().unsubscribe(self.conversation, listener)

    async def _events(self, offset: str | None) -> AsyncIterator[str]:
        """Yield what a client gets, up to the end of a run.

        The listener comes and goes with the iteration: a response that nobody reads
        leaves none behind.
        """
        self.listener = listener = Subscription()
        self._sit_down(self.conversation)
        try:
            await self._catch_up(listener, offset)
            while True:
                frame = await self._next()
                if not await self._may_stay():
                    break
                if frame is None:
                    yield ":\n\n"
                    continue
                yield self._written(frame.event, frame.id)
                if frame.is_last:
                    return
        except Exception as exc:
            self._ended_by = _status_of(exc)
        finally:
            get_run_manager().unsubscribe(self.conversation, listener)
            self.get_up()
        for event in self._broken_off():
            yield self._written(event)

    def _broken_off(self) -> list[dict[str, Any]]:
        """End the stream, though not the run, for a client that needs an end."""
        told, code = self.listener.open, CODES[self._ended_by or 503]
        run_id = told.run_id or f"refused:{uuid.uuid4().hex[:12]}"
        end = run_error(code, message_for(code), run_id=run_id)
        if told.run_id:
            return [*told.ends(), end]
        return [run_started(self.conversation.session_id, run_id), end]

    async def _next(self) -> Any:
        """Wait for the next frame; None where there is none for a while."""
        listener = self.listener
        while True:
            try:
                async with asyncio.timeout(
                    min(self.comment_interval, self.recheck_interval)
                ):
                    frame = await listener.get()
            except TimeoutError:
                return None
            if frame is not None or self._ended_by is not None:
                return frame
            last = listener.last if listener.open.run_id else None
            await self._catch_up(listener, last.id if last else None, begins=False)

    async def _catch_up(
        self, listener: Subscription, offset: str | None, *, begins: bool = True
    ) -> None:
        await get_run_manager().sync(
            self.conversation,
            listener,
            offset=offset,
            options=self.stream_options,
            stale_after=self.limits.stale_after,
            begins=begins,
        )

    async def displace(self, *, shutting_down: bool = False) -> None:
        """End the stream: the user has opened too many others, or the process ends."""
        self._ended_by = 503 if shutting_down else 429
        self.listener.give_up()

    async def _may_stay(self) -> bool:
        """Return whether the user may hear more; an answer counts for a while."""
        asked = time.monotonic()
        if self._ended_by is None and asked - self._checked >= self.recheck_after:
            session_id = self.conversation.session_id
            self._ended_by = await self._objection(session_id, self.conversation)
            self._checked = asked
        return self._ended_by is None

    async def _objection(
        self, session_id: str, conversation: Conversation | None
    ) -> int | None:
        if self._has_token and conversation is not None:
            user = await ask(self.get_token_user, self.request)
            if user is None or user.pk != self.user.pk:
                return 401
        return await super()._objection(session_id, conversation)

    def _read_user(self) -> Any:
        return self._visitor.read()

    def _written(self, event: dict[str, Any], event_id: str = "") -> str:
        with override(self._language):
            event = in_words(event)
        # ASCII escapes: a lone surrogate can't be sent in UTF-8.
        data = json.dumps(event, separators=(",", ":"))
        return f"id: {event_id}\ndata: {data}\n\n" if event_id else f"data: {data}\n\n"


def _read(request: HttpRequest) -> RunRequest | SwitchRequest:
    try:
        asked = parse_frame(request.body.decode())
    except (UnicodeDecodeError, RawPostDataException, UnreadablePostError):
        raise FrameError("bad_request", "The body is not JSON.") from None
    if not isinstance(asked, RunRequest | SwitchRequest):
        raise FrameError("bad_request", "The body is a RunAgentInput, without a type.")
    return asked


def _header(request: HttpRequest, name: str) -> str:
    """Return a header as browsers send it: in UTF-8, which Django reads as Latin 1."""
    return request.headers.get(name, "").encode("latin1").decode(errors="replace")


def _status_of(exc: Exception) -> int:
    if isinstance(exc, SessionDoesNotExist):
        return 404
    return 503 if may_be_back(exc, "stream", logger) else 500
