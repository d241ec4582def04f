"""The list of sessions, and one session as a transcript."""

from __future__ import annotations

import unicodedata
from itertools import islice
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db.models import Q
from django.http import HttpRequest
from django.urls import URLPattern, path
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from agent_sessions.admin.clearing import ClearingMixin
from agent_sessions.admin.exporting import ExportMixin
from agent_sessions.admin.layout import in_words
from agent_sessions.admin.lists import (
    ActivityFilter,
    CappedPaginator,
    OwnerFilter,
    StateFilter,
    StoreFilter,
    words_of,
)
from agent_sessions.admin.overview import OverviewMixin
from agent_sessions.admin.rules import Rows, database
from agent_sessions.admin.transcript import TranscriptMixin
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import InvalidBackend, MissingExtra
from agent_sessions.handler import sessions
from agent_sessions.models import AgentSession

# Sessions that a search takes of each of its columns.
FOUND = 1_000
_ID = "session_id__startswith"


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
        StateFilter,
        ("updated_at", ActivityFilter),
        ("user", OwnerFilter),
    )
    # The index serves this order; the time of last activity has none, see the model.
    ordering = ("-active_on", "-pk")
    sortable_by: ClassVar[Any] = ("updated_at",)
    sorted_as: ClassVar[dict[str, str]] = {"updated_at": "active_on"}

    # -- list ----------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> Rows:
        # The owner comes along: by itself Django asks a router.
        rows = super().get_queryset(request).using(database())
        return rows.select_related("user").defer("metadata")

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

    # -- search --------------------------------------------------------------------

    def get_search_fields(self, request: HttpRequest) -> tuple[str, ...]:
        return (_ID, _owner(), *(("title",) if self.reads_all(request) else ()))

    search_help_text = _(
        "The beginning of a session id, an exact user name, or words of a title of the "
        "10,000 sessions that were active last. Message texts are not searched."
    )

    def search(self, rows: Rows, path: str, terms: list[str]) -> Q:
        """Find sessions by an index, or among the newest: the first 1,000."""
        newest = rows.select_related(None).order_by("-active_on", "-pk")
        if path == _owner():
            users = get_user_model()._base_manager.using(rows.db)
            name = f"{get_user_model().USERNAME_FIELD}__in"
            return Q(
                user_id__in=list(
                    users.filter(**{name: terms}).values_list("pk", flat=True)
                )
            )
        if path == _ID:
            found = Q(pk__in=())
            for term in terms:
                # As LIKE finds them, which takes no index on SQLite.
                found |= Q(session_id__gte=term, session_id__lt=_after(term))
            keys = rows.select_related(None).filter(found).order_by("session_id")
            return Q(pk__in=list(keys.values_list("pk", flat=True)[:FOUND]))
        if path == "title":
            words = [_plain(word) for word in words_of(terms[0])]
            titles = newest.values_list("pk", "title")[: CappedPaginator.limit]
            matching = (pk for pk, title in titles.iterator() if _has(title, words))
            return Q(pk__in=list(islice(matching, FOUND)))
        return super().search(rows, path, terms)

    # -- columns -------------------------------------------------------------------

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


def _owner() -> str:
    return f"user__{get_user_model().USERNAME_FIELD}__exact"


def _after(term: str) -> str:
    """Return the first text that comes after all that begin with a term.

    Its characters are like those of the term: connections to MariaDB and MySQL may be
    set to fewer than all.
    """
    last = ord(term[-1]) + 1
    return term[:-1] + chr(0xE000 if last == 0xD800 else min(last, 0x10FFFF))


def _plain(text: str) -> str:
    """Return a text without what a search does not look at: case and composition."""
    return unicodedata.normalize("NFC", text).casefold()


def _has(title: str, words: list[str]) -> bool:
    title = _plain(title)
    return all(word in title for word in words)


def _is_encrypted(obj: AgentSession) -> bool:
    """Return whether a session's alias is one that encrypts, and keeps titles empty."""
    try:
        return sessions[obj.backend].encrypts
    except (InvalidBackend, MissingExtra):
        return False
