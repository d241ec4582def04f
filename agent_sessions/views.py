"""The HTTP that a chat page needs beside its websocket: JSON, own sessions only."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from django.db import transaction
from django.db.models import Q
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.views import View

from agent_sessions.agui import StreamOptions, messages_from_items
from agent_sessions.backends.base import BaseSessionBackend, SessionKey, make_key
from agent_sessions.exceptions import EncryptionError, InvalidSessionId
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.models import AgentSession
from agent_sessions.runs.conversation import create_conversation


class SessionAPIView(View):
    """Base of the JSON views: 401 without a user, 404 for what isn't theirs."""

    backend: str = DEFAULT_ALIAS
    # Not `options`: that is View's handler of the HTTP method.
    stream_options: StreamOptions = StreamOptions()
    page_size: ClassVar[int] = 50

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if not request.user.is_authenticated:
            return JsonResponse({"error": "not_logged_in"}, status=401)
        response: HttpResponseBase
        try:
            response = super().dispatch(request, *args, **kwargs)
        except EncryptionError:
            # Not an empty conversation: its key isn't here.
            response = JsonResponse({"error": "unreadable"}, status=503)
        # What a shared computer's cache keeps could be read by the next user.
        response.setdefault("Cache-Control", "private, no-store")
        return response

    @property
    def store(self) -> BaseSessionBackend:
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

    def get(self, request: HttpRequest) -> HttpResponse:
        using = self.store.directory.using
        rows = AgentSession.objects.using(using).for_user(request.user)  # type: ignore[arg-type]
        rows = rows.filter(backend=self.backend).order_by("-updated_at", "-pk")
        if cursor := request.GET.get("after"):
            when, pk = _parse_cursor(cursor)
            if when is None:
                return JsonResponse({"error": "bad_cursor"}, status=400)
            rows = rows.filter(Q(updated_at__lt=when) | Q(updated_at=when, pk__lt=pk))
        found = list(rows[: self.page_size + 1])
        page = found[: self.page_size]
        more = len(found) > self.page_size
        return JsonResponse(
            {
                "sessions": [
                    {
                        "id": row.session_id,
                        "title": row.title,
                        "updatedAt": row.updated_at.isoformat(),
                        "state": row.state,
                    }
                    for row in page
                ],
                "next": f"{page[-1].updated_at.isoformat()}~{page[-1].pk}"
                if more
                else None,
            }
        )

    def post(self, request: HttpRequest) -> HttpResponse:
        row = create_conversation(request.user, backend=self.backend)  # type: ignore[arg-type]
        return JsonResponse({"id": row.session_id}, status=201)


class SessionView(SessionAPIView):
    """Delete one of the user's sessions with all that it holds."""

    def delete(self, request: HttpRequest, session_id: str) -> HttpResponse:
        key, row = self.find(session_id)
        if row is None:
            return JsonResponse({"error": "not_found"}, status=404)
        if row.state == AgentSession.State.RUNNING:
            return JsonResponse({"error": "session_busy"}, status=409)
        self.store.clear(key)
        with transaction.atomic(self.store.directory.using):
            row.delete()
        return HttpResponse(status=204)


class SessionMessagesView(SessionAPIView):
    """Read the messages before a cursor, as a page scrolls back."""

    page_size = 100

    def get(self, request: HttpRequest, session_id: str) -> HttpResponse:
        key, row = self.find(session_id)
        if row is None:
            return JsonResponse({"error": "not_found"}, status=404)
        cursor = request.GET.get("before")
        if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
            return JsonResponse({"error": "bad_cursor"}, status=400)
        page = self.store.page(
            key, before=int(cursor) if cursor else None, limit=self.page_size
        )
        self.store.assert_open(page)
        return JsonResponse(
            {
                "messages": messages_from_items(page.items, self.stream_options),
                "before": str(page.items[0].position) if page.has_earlier else None,
            }
        )


def _parse_cursor(cursor: str) -> tuple[datetime | None, int]:
    when, _, pk = cursor.partition("~")
    try:
        return datetime.fromisoformat(when), int(pk)
    except ValueError:
        return None, 0
