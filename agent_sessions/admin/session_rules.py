"""Who may view, read, clear and delete a session, asked for each session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import messages
from django.contrib.admin.options import BaseModelAdmin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import ngettext

from agent_sessions.admin.permissions import has_own, may
from agent_sessions.admin.rules import RowRules
from agent_sessions.models import AgentSession

Rows = QuerySet[AgentSession]


class SessionRules(RowRules):
    """The hooks of sessions. A project's subclass may refuse single sessions.

    Each is asked twice: without a session, may the reader do so at all; with one, may
    the reader do so to this one. Without `view`, no other hook is of use.
    """

    harmless = frozenset(
        [
            "id",
            "backend",
            "session_id",
            "user",
            "item_count",
            "requests",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "reasoning_tokens",
            "agent_name",
            "state",
            "created_at",
            "updated_at",
            "active_on",
            "expires_at",
        ]
    )

    def has_view_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        # Only the right of that name: Django's also takes the one to change.
        return may(request, "view")

    def has_read_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        """Return whether the reader may see what was said."""
        return self.has_view_permission(request, obj) and may(request, "read")

    def has_clear_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        """Return whether the reader may empty sessions."""
        return may(request, "clear")

    def has_delete_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        # Those who may only delete view nothing.
        if obj is not None and self.is_hidden(request, obj):
            return False
        return super().has_delete_permission(request, obj)

    # -- asking --------------------------------------------------------------------

    def allows(
        self, request: HttpRequest, right: str, obj: AgentSession | None
    ) -> bool:
        """Return whether the reader may view a session and do this to it."""
        hook: Any = getattr(self, f"has_{right}_permission")
        return self.has_view_permission(request, obj) and hook(request, obj)

    def permitted(
        self, request: HttpRequest, rows: Iterable[AgentSession], right: str
    ) -> list[AgentSession]:
        """Leave out the sessions that a hook refuses, and tell how many they are."""
        seen = self.shown(request, rows)
        if not self.has_rules("view", right):
            return seen
        kept = [row for row in seen if self.allows(request, right, row)]
        if left := len(seen) - len(kept):
            text = ngettext(
                "%d session was left out: you may not do this to it.",
                "%d sessions were left out: you may not do this to them.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING, "", True)
        return kept

    def shown(self, request: HttpRequest, rows: Iterable[Any]) -> list[Any]:
        kept = super().shown(request, rows)
        asks, reads = self.has_rules("view", "read"), self.has_read_permission(request)
        for row in kept:
            if not (self.allows(request, "read", row) if asks else reads):
                # Whatever a column of the list shows, it can't show this.
                row.title = ""
        return kept

    def asks_rows(self) -> bool:
        return self.has_rules("view")

    def reads_all(self, request: HttpRequest) -> bool:
        # A database can't ask a project's hooks.
        return self.has_read_permission(request) and not self.has_rules("view", "read")

    def has_rules(self, *rights: str) -> bool:
        """Return whether a subclass has hooks of its own, which may refuse a row."""
        return any(
            has_own(self, f"has_{right}_permission", SessionRules) for right in rights
        )

    def label(self, request: HttpRequest, row: AgentSession) -> str:
        """Name a session for this reader: a title quotes the first message."""
        if row.title and self.allows(request, "read", row):
            return str(row.title)
        return str(row.session_id)


# Hooks that a database need not be asked for: they are the same for every session.
VIEWS = (SessionRules, BaseModelAdmin)
