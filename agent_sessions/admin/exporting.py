"""Export sessions as files: JSON and Markdown, streamed and logged."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import chain
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.utils import unquote
from django.core.handlers.asgi import ASGIRequest
from django.http import (
    Http404,
    HttpRequest,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.http.response import HttpResponseBase
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from agent_sessions.admin.addresses import address
from agent_sessions.admin.rules import Rows, SessionRules
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession
from agent_sessions.reports import leave
from agent_sessions.transfer.export import FORMS

# Sessions of one file.
MOST = 100
# Characters that are sent at once.
_CHUNK = 64 * 1024


class ExportMixin(SessionRules):
    """Export sessions that the reader may read."""

    @admin.action(
        permissions=["read"],
        description=gettext_lazy("Export selected %(verbose_name_plural)s as JSON"),
    )
    def export_json(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponseBase | None:
        """Send the selected sessions as lines of JSON."""
        return self._export(request, queryset, "json")

    @admin.action(
        permissions=["read"],
        description=gettext_lazy("Export selected %(verbose_name_plural)s as Markdown"),
    )
    def export_markdown(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponseBase | None:
        """Send the selected sessions as one Markdown text."""
        return self._export(request, queryset, "markdown")

    def export_view(
        self, request: HttpRequest, object_id: str, form: str
    ) -> HttpResponseBase:
        """Send one session as a file."""
        obj = self.get_allowed(request, object_id, "read")
        if form not in FORMS:
            raise Http404
        if obj is None:
            # That page says that there is no such session.
            return HttpResponseRedirect(address(self, "change", unquote(object_id)))
        # A name that every file system and header takes.
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", obj.session_id).strip("-.")[:80]
        response = self._export(request, [obj], form, name=name)
        return response or HttpResponseRedirect(address(self, "change", obj.pk))

    def _export(
        self,
        request: HttpRequest,
        sessions: Rows | list[AgentSession],
        form: str,
        *,
        name: str = "",
    ) -> HttpResponseBase | None:
        rows = self.few(request, sessions, MOST)
        make, ending, content_type = FORMS[form]
        pieces: list[Iterable[str]] = []
        given: list[AgentSession] = []
        for row in self.permitted(request, rows, "read"):
            found = make(row, None)
            try:
                first = next(found)
            except AgentSessionError as exc:
                error = _("%(name)s was not exported: %(error)s")
                told = {"name": row.session_id, "error": exc}
                self.message_user(request, error % told, messages.ERROR)
            else:
                pieces.append(chain([first], found))
                given.append(row)
        if not given:
            return None
        reader: Any = request.user.pk
        LogEntry.objects.log_actions(reader, given, CHANGE, f"Exported as {form}.")
        filename = f"{name or 'agent-sessions'}.{ending}"
        return stream(request, chain.from_iterable(pieces), filename, content_type)


def stream(
    request: HttpRequest, pieces: Iterator[str], filename: str, content_type: str
) -> HttpResponseBase:
    """Send text as a file, as it is made, under WSGI and ASGI."""
    chunks = _chunks(pieces)
    # Under ASGI, Django would read a plain iterator whole before it sends anything.
    body: Any = _stepwise(chunks) if isinstance(request, ASGIRequest) else chunks
    return StreamingHttpResponse(
        body,
        content_type=content_type,
        headers={
            "Content-Disposition": f'attachment; filename="{filename}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        },
    )


def _chunks(pieces: Iterator[str]) -> Iterator[bytes]:
    held: list[str] = []
    length = 0
    try:
        for piece in pieces:
            held.append(piece)
            length += len(piece)
            if length >= _CHUNK:
                yield "".join(held).encode()
                held, length = [], 0
    except Exception as exc:
        # The view, which is guarded, has returned long ago.
        leave(exc)
        raise
    yield "".join(held).encode()


async def _stepwise(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    # In the request's own thread, as database connections belong to threads.
    def step() -> bytes | None:
        return next(chunks, None)

    try:
        while (chunk := await sync_to_async(step)()) is not None:
            yield chunk
    except Exception as exc:
        # What was sent last is still at hand.
        leave(exc)
        raise
