"""The list of sessions, and one session as a transcript."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.http import HttpRequest
from django.urls import URLPattern, path
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from agent_sessions.admin.clearing import ClearingMixin
from agent_sessions.admin.exporting import ExportMixin
from agent_sessions.admin.layout import in_words
from agent_sessions.admin.lists import ActivityFilter, StoreFilter
from agent_sessions.admin.overview import OverviewMixin
from agent_sessions.admin.rules import Rows, database
from agent_sessions.admin.transcript import TranscriptMixin
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import InvalidBackend, MissingExtra
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession


@admin.register(AgentSession)
class AgentSessionAdmin(ClearingMixin, ExportMixin, TranscriptMixin, OverviewMixin):
    """Sessions to look at: found by their metadata, read with a right of its own."""

    actions: Any = (
        "clear_history",
        "delete_selected",
        "export_json",
        "export_markdown",
    )
    list_filter: ClassVar[Any] = (
        StoreFilter,
        "state",
        ("updated_at", ActivityFilter),
        ("user", admin.EmptyFieldListFilter),
    )
    # The index serves this order; the time of last activity has none, see the model.
    ordering = ("-active_on", "-pk")
    sortable_by: ClassVar[Any] = ("item_count", "updated_at", "created_at")
    # -- list ----------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> Rows:
        # The owner and branch come along: by itself Django asks a router for them.
        rows = super().get_queryset(request).using(database())
        return rows.select_related("user", "branch").defer("metadata")

    def get_list_display(self, request: HttpRequest) -> tuple[str, ...]:
        # A title quotes the first message.
        name = "name" if self.has_read_permission(request) else "session_id"
        return (
            name,
            "user",
            "store",
            "item_count",
            "tokens",
            "state_in_words",
            "updated_at",
            "created_at",
        )

    def get_search_fields(self, request: HttpRequest) -> tuple[str, ...]:
        owner = f"user__{get_user_model().USERNAME_FIELD}__exact"
        titles = ("title",) if self.reads_all(request) else ()
        return ("session_id__startswith", owner, *titles)

    search_help_text = _(
        "Session id, exact user name, or words of the title. Message texts are not "
        "searched."
    )

    @admin.display(description=_("title"))
    def name(self, obj: AgentSession) -> str:
        if obj.title:
            return str(obj.title)
        text = obj.session_id if obj.item_count else _("(empty)")
        if obj.item_count and _is_encrypted(obj):
            text = format_html("{} {}", _("(encrypted)"), obj.session_id)
        return format_html('<span class="as-quiet">{}</span>', text)

    @admin.display(description=_("store"))
    def store(self, obj: AgentSession) -> str:
        return str(obj.backend)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        states = find_states(changelist.result_list)
        for row in changelist.result_list:
            # Shown, never saved.
            row.state = states[row.pk]
        return changelist

    @admin.display(description=_("state"))
    def state_in_words(self, obj: AgentSession) -> str:
        return in_words(obj.state, obj.get_state_display())

    def get_urls(self) -> list[URLPattern]:
        def page(name: str, route: str, view: Any) -> URLPattern:
            name = f"{self.opts.app_label}_{self.opts.model_name}_{name}"
            found: URLPattern = path(route, self.admin_site.admin_view(view), name=name)
            return found

        one = "<path:object_id>/"
        return [
            page("clear", f"{one}clear/", self.clear_view),
            page("item", f"{one}items/<int:position>/", self.item_view),
            page("export", f"{one}export/<slug:form>/", self.export_view),
            page("overview", "overview/", self.overview_view),
            *super().get_urls(),
        ]


def _is_encrypted(obj: AgentSession) -> bool:
    """Return whether a session's alias is one that encrypts, and keeps titles empty."""
    try:
        return sessions[obj.backend].encrypts
    except (InvalidBackend, MissingExtra):
        return False
