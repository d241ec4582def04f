"""The HTTP that a chat page needs beside its websocket: JSON, own sessions only."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.db import InterfaceError, OperationalError
from django.db.models import Q
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.utils.timezone import is_aware
from django.utils.translation import get_language_from_request
from django.views import View

from agent_sessions.agui import StreamOptions
from agent_sessions.approvals import find_states
from agent_sessions.backends.base import BaseSessionBackend, Page, SessionKey, make_key
from agent_sessions.backends.keys import names_user
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidSessionId,
    SessionBusy,
    SessionDoesNotExist,
    StorageError,
)
from agent_sessions.handler import ChatAlias, sessions
from agent_sessions.models import AgentSession
from agent_sessions.ratelimit import RateLimit
from agent_sessions.reports import guarded
from agent_sessions.retention import Removal, Spared, finish_later, remove
from agent_sessions.runs.failures import refusal
from agent_sessions.runs.pages import WIDER, lacks_calls, shown, told_of
from agent_sessions.runs.setup import Conversation, create_conversation
from agent_sessions.times import day_of, iso

logger = logging.getLogger("agent_sessions.views")

# What a column of 64 bits holds.
LARGEST = 2**63 - 1
# Dates that every database and each time zone takes.
_YEARS = range(1000, 9999)


class SessionAPIView(View):
    """Base of the JSON views: 401 without a user, 404 for what isn't theirs.

    Each refusal is `{"code": …, "message": …}`; docs/websocket.md has the codes.
    """

    # AGENT_SESSIONS_CHAT_BACKEND, else "default".
    backend: str = ChatAlias()  # type: ignore[assignment]
    # Not `options`: that is View's handler of the HTTP method.
    stream_options: StreamOptions = StreamOptions()
    page_size: ClassVar[int] = 50

    def authorize(self, user: Any, session_id: str | None) -> Any:
        """Return whether a user may do this, plain or async, as the consumer's does.

        `session_id` is None where sessions are listed and where one is made.
        """
        return True

    def refuse(
        self, code: str, status: int, headers: dict[str, str] | None = None
    ) -> JsonResponse:
        """Answer with a refusal's code, and its sentence in the reader's language."""
        return refusal(code, status, get_language_from_request(self.request), headers)

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:
        """Return the view; it answers 401 to visitors who aren't logged in."""
        # LoginRequiredMiddleware would redirect to a page; dispatch() answers 401.
        view: Callable[..., HttpResponseBase] = super().as_view(**initkwargs)
        return login_not_required(view)

    @guarded
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Answer a request; no cache may keep the answer."""
        response = self._answer(request, *args, **kwargs)
        # What a shared computer's cache keeps could be read by the next user.
        response.setdefault("Cache-Control", "private, no-store")
        return response

    def http_method_not_allowed(
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> Any:
        """Answer 405 as JSON."""
        allowed = super().http_method_not_allowed(request, *args, **kwargs)["Allow"]
        return self.refuse("method_not_allowed", 405, {"Allow": allowed})

    def _answer(
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        # Some authentication backends let inactive users in; the websocket doesn't.
        user = request.user
        if not (user.is_authenticated and user.is_active and names_user(user)):
            return self.refuse("not_logged_in", 401)
        try:
            if not self._is_authorized(kwargs.get("session_id")):
                return self.refuse("forbidden", 403)
            return super().dispatch(request, *args, **kwargs)
        except PermissionDenied:
            return self.refuse("forbidden", 403)
        except SuspiciousOperation:
            # Too many fields in the query string, which is read here first.
            return self.refuse("bad_request", 400)
        except SessionDoesNotExist:
            return self.refuse("not_found", 404)
        except SessionBusy:
            return self.refuse("session_busy", 409)
        except EncryptionError as exc:
            # Not an empty conversation: its key isn't here.
            logger.warning("A history doesn't open (%s)", type(exc).__name__)
            return self.refuse("unreadable", 503)
        except (StorageError, InterfaceError, OperationalError) as exc:
            logger.warning("A store could not be used (%s)", type(exc).__name__)
            return self.refuse("unavailable", 503)

    def _is_authorized(self, session_id: str | None) -> bool:
        answer = self.authorize(self.request.user, session_id)
        if inspect.isawaitable(answer):
            # A coroutine is true, whatever it would say.
            answer = async_to_sync(_wait_for)(answer)
        return bool(answer)

    @property
    def store(self) -> BaseSessionBackend:
        """The backend of the alias."""
        return sessions[self.backend]

    def find(self, session_id: str) -> tuple[SessionKey, AgentSession | None]:
        """Find the user's own session by its id; None where it isn't there."""
        try:
            key = make_key(session_id, self.request.user)
        except InvalidSessionId:
            return SessionKey(""), None
        return key, self.store.directory.rows(key).first()


class SessionListView(SessionAPIView):
    """List the user's sessions, newest activity first, and make new ones."""

    # Sessions that one user may make.
    max_sessions_per_minute: int = 20

    def get_rate_limit(self) -> RateLimit:
        """Choose what counts the sessions that a user makes."""
        return RateLimit("sessions", self.max_sessions_per_minute)

    def get(self, request: HttpRequest) -> HttpResponse:
        """List the user's sessions, newest first, a page at a time."""
        using = self.store.directory.using
        rows = AgentSession.objects.using(using).for_user(request.user)  # type: ignore[arg-type]
        rows = rows.filter(backend=self.backend)
        # An index has the day: it narrows, the time decides.
        rows = rows.order_by("-active_on", "-updated_at", "-pk")
        if cursor := request.GET.get("after"):
            moment = read_moment(cursor)
            if moment is None:
                return self.refuse("bad_cursor", 400)
            when, pk = moment
            before = Q(updated_at__lt=when) | Q(updated_at=when, pk__lt=pk)
            rows = rows.filter(before, active_on__lte=day_of(when))
        found = list(rows[: self.page_size + 1])
        page = found[: self.page_size]
        states = find_states(page)
        more = len(found) > self.page_size
        return JsonResponse(
            {
                "sessions": [
                    {
                        "id": row.session_id,
                        "title": row.title,
                        "updatedAt": iso(row.updated_at),
                        "state": states[row.pk],
                    }
                    for row in page
                ],
                "next": write_moment(page[-1].updated_at, page[-1].pk)
                if more
                else None,
            }
        )

    def post(self, request: HttpRequest) -> HttpResponse:
        """Make a session for the user; answer 201 with its id."""
        limit = self.get_rate_limit()
        if not limit.take(request.user.pk):
            return self.refuse("rate_limited", 429, {"Retry-After": str(limit.wait())})
        row = create_conversation(request.user, backend=self.backend)  # type: ignore[arg-type]
        return JsonResponse({"id": row.session_id}, status=201)


class SessionView(SessionAPIView):
    """Delete one of the user's sessions with all that it holds."""

    def delete(self, request: HttpRequest, session_id: str) -> HttpResponse:
        """Delete a session; answer 204, or 404 where it isn't the user's."""
        _, row = self.find(session_id)
        if row is None:
            return self.refuse("not_found", 404)
        try:
            remove(row, Removal(delete=True, waiting=True))
        except Spared:
            return self.refuse("session_busy", 409)
        # What a long history leaves, and nobody finds any more.
        finish_later(using=self.store.directory.using)
        return HttpResponse(status=204)


class SessionMessagesView(SessionAPIView):
    """Read the messages before a cursor, as a page scrolls back."""

    page_size = 100
    # Bytes of one answer; it holds fewer messages where these are long.
    max_bytes: int = 1024 * 1024

    def get(self, request: HttpRequest, session_id: str) -> HttpResponse:
        """Return a page of a session's messages, the newest without `before`."""
        key, row = self.find(session_id)
        if row is None:
            return self.refuse("not_found", 404)
        cursor = request.GET.get("before")
        before = None if cursor is None else read_number(cursor)
        if cursor is not None and before is None:
            return self.refuse("bad_cursor", 400)
        page = self.store.page(key, before=before, limit=self.page_size)
        if lacks_calls(page):
            size = self.page_size * WIDER
            page = self.store.page(key, before=before, limit=size)
        conversation = Conversation(row.pk, self.store, key)
        page = told_of(page, conversation, before)
        messages, about = shown(page, self.stream_options, self.max_bytes)
        earlier = about["before"]
        if page.items and earlier == str(page.items[-1].position + 1):
            # The newest is longer than all that fits: it comes alone.
            page = Page(page.items[-1:], page.has_earlier or len(page.items) > 1)
            messages, about = shown(page, self.stream_options, sys.maxsize)
        about = {name: value for name, value in about.items() if value}
        return JsonResponse({"messages": messages, "before": None, **about})


def read_number(text: str) -> int | None:
    """Read a whole number of 0 or more that a column holds; None for all else."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(LARGEST)):
        return None
    number = int(text)
    return number if number <= LARGEST else None


def write_moment(when: datetime, pk: int) -> str:
    """Return the cursor of a row by its time and primary key."""
    if is_aware(when):
        when = when.astimezone(UTC)
    return f"{when.isoformat()}~{pk}"


def read_moment(cursor: str) -> tuple[datetime, int] | None:
    """Read what write_moment() has given; None for all else."""
    text, _, number = cursor.partition("~")
    pk = read_number(number)
    try:
        when = datetime.fromisoformat(text)
        if pk is None or write_moment(when, pk) != cursor:
            return None
    except (ValueError, OverflowError):
        return None
    usable = is_aware(when) == settings.USE_TZ and when.year in _YEARS
    return (when, pk) if usable else None


async def _wait_for(answer: Awaitable[Any]) -> Any:
    return await answer
