"""The runs of agents: a list, and one run with what it used and wrote."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from agent_sessions.admin.approvals import approvals
from agent_sessions.admin.databases import database
from agent_sessions.admin.filters import StartedFilter
from agent_sessions.admin.formatting import grouped, how_long, in_words
from agent_sessions.admin.guarding import GuardedAdmin
from agent_sessions.admin.layout import lay_out
from agent_sessions.admin.paginator import CappedPaginator
from agent_sessions.admin.permissions import (
    MOST_ASKED,
    has_own,
    hides,
    may,
    narrowed,
    registered,
)
from agent_sessions.admin.reading import History
from agent_sessions.admin.rules import RowRules
from agent_sessions.admin.session_rules import VIEWS, SessionRules
from agent_sessions.admin.transcript import PAGE_LENGTH, item_url, owner_url
from agent_sessions.approvals import waiting as find_waiting
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.transcript.parts import json_part

_COUNTS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "total_tokens",
)


@admin.register(AgentRun)
class AgentRunAdmin(GuardedAdmin, RowRules):
    """Runs to look at: how they went, what they used, what they wait for."""

    list_display = (
        "run_id",
        "session",
        "status_in_words",
        "agent_name",
        "model",
        "tokens",
        "duration",
        "started_at",
        "error_code",
    )
    list_filter: ClassVar[Any] = ("status", StartedFilter)
    list_per_page = 50
    # Keys ascend with time, and every database has them in order.
    ordering = ("-pk",)
    sortable_by = ()
    search_fields = ("=run_id", "=session__session_id")
    search_help_text = _("The whole id of a run or of a session.")
    paginator = CappedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = None
    harmless = frozenset(
        [
            "id",
            "run_id",
            "session",
            "branch",
            "resumed_by",
            "agent_name",
            "model",
            "status",
            "started_at",
            "finished_at",
            "first_position",
            "last_position",
            "turn",
            "requests",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "reasoning_tokens",
            "total_tokens",
            "error_code",
            "trace_id",
            "sdk_version",
            "expires_at",
        ]
    )

    class Media:
        css = {"all": ("agent_sessions/admin.css",)}
        js = ("agent_sessions/admin.js",)

    # -- permissions ---------------------------------------------------------------

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(
        self, request: HttpRequest, obj: AgentRun | None = None
    ) -> bool:
        return False

    def has_view_permission(
        self, request: HttpRequest, obj: AgentRun | None = None
    ) -> bool:
        return may(request, "view", "agentrun")

    def has_delete_permission(
        self, request: HttpRequest, obj: AgentRun | None = None
    ) -> bool:
        # Runs go with their session, so this is asked where a user is deleted, as the
        # session is, with its own hook; by themselves they stay, see delete_view().
        sessions = registered(self, AgentSession)
        if sessions is None:
            return may(request, "delete")
        return bool(sessions.has_delete_permission(request))

    def is_hidden(self, request: HttpRequest, obj: AgentRun) -> bool:
        sessions = registered(self, AgentSession)
        return super().is_hidden(request, obj) or (
            sessions is not None and hides(sessions, request, obj.session)
        )

    def asks_rows(self) -> bool:
        sessions = registered(self, AgentSession)
        return has_own(self, "has_view_permission", AgentRunAdmin) or (
            sessions is not None and has_own(sessions, "has_view_permission", *VIEWS)
        )

    def reads_all(self, request: HttpRequest) -> bool:
        sessions = registered(self, AgentSession)
        return isinstance(sessions, SessionRules) and sessions.reads_all(request)

    def may_read(self, request: HttpRequest, obj: AgentRun) -> bool:
        """Return whether the reader may see what was said, by the session's admin."""
        sessions = registered(self, AgentSession)
        return isinstance(sessions, SessionRules) and sessions.allows(
            request, "read", obj.session
        )

    def delete_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        raise PermissionDenied

    # -- list ----------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> QuerySet[AgentRun]:
        # What a run leads to comes along: by itself Django asks a router for it.
        rows = super().get_queryset(request).using(database())
        rows = rows.select_related("session__user", "branch")
        rows = rows.defer("state", "session__metadata")
        admin_of_sessions = registered(self, AgentSession)
        sessions = admin_of_sessions and narrowed(admin_of_sessions, request)
        if sessions is None:
            return rows
        return rows.filter(session_id__in=sessions.values("pk"))

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> Any:
        waiting = 0
        if self.has_view_permission(request):
            waiting = count_waiting(self, request)
        context = {"waiting": waiting_text(waiting) if waiting else ""}
        return super().changelist_view(request, {**context, **(extra_context or {})})

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        # Read at once: the number of queries doesn't grow with the rows.
        asked = approvals(changelist.result_list)
        for run in changelist.result_list:
            run.asked = asked.get(run.pk, ())
        return changelist

    @admin.display(description=_("status"))
    def status_in_words(self, obj: AgentRun) -> str:
        if obj.status != AgentRun.Status.WAITING:
            return in_words(obj.status, obj.get_status_display())
        asked = getattr(obj, "asked", None)
        if asked is None:
            asked = approvals([obj]).get(obj.pk, ())
        if not asked:
            # Nobody can answer it: the next message ends it.
            over = AgentRun.Status.INTERRUPTED
            return in_words(over.value, str(over.label))
        words = in_words(obj.status, obj.get_status_display())
        tools = ", ".join(approval.tool for approval in asked)
        return format_html("{} <code>{}</code>", words, tools) if tools else words

    @admin.display(description=_("tokens (in / out)"), empty_value="-")
    def tokens(self, obj: AgentRun) -> str | None:
        if not (obj.input_tokens or obj.output_tokens):
            return None
        return f"{grouped(obj.input_tokens)} / {grouped(obj.output_tokens)}"

    @admin.display(description=_("duration"), empty_value="-")
    def duration(self, obj: AgentRun) -> str | None:
        if obj.finished_at is None:
            return None
        return how_long(obj.started_at, obj.finished_at)

    # -- one run -------------------------------------------------------------------

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        # The page has no form; its template shows everything.
        return ()

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> HttpResponse:
        run: AgentRun = kwargs["obj"]
        may_see = self.may_read(request, run)
        asked = approvals([run]).get(run.pk, ())
        run.asked = asked  # type: ignore[attr-defined]
        context |= {
            "counts": [
                (self.opts.get_field(name).verbose_name, grouped(getattr(run, name)))  # type: ignore[union-attr]
                for name in _COUNTS
            ],
            "status": self.status_in_words(run),
            "duration": self.duration(run),
            "approvals": asked,
            # Whatever a provider writes there is not ours to vouch for.
            "usage": [json_part(run.usage)] if run.usage and may_see else [],
            "session_url": self._session_url(request, run),
            "owner_url": owner_url(self, request, run.session),
            "has_read_permission": may_see,
            "show_delete": False,
        }
        if may_see and run.first_position is not None and run.last_position is not None:
            context |= self._items(request, run, run.first_position, run.last_position)
        elif may_see and context["approvals"]:
            self._log_reading(request, run)
        return super().render_change_form(request, context, *args, **kwargs)

    def _items(
        self, request: HttpRequest, run: AgentRun, first: int, last: int
    ) -> dict[str, Any]:
        branch = "" if run.branch is None else run.branch.label
        history = History(run.session, branch)
        limit = max(1, min(last - first + 1, PAGE_LENGTH))
        try:
            page = history.page(after=first - 1, limit=limit)
        except AgentSessionError as exc:
            return {"transcript_error": str(exc)}
        self._log_reading(request, run)
        items = [item for item in page.items if item.position <= last]
        chosen = history.chosen
        address = item_url(self, run.session, chosen.name if chosen else None)
        return {
            "lines": lay_out(items, (), address),
            "has_more": bool(items) and items[-1].position < last and page.has_later,
        }

    def _log_reading(self, request: HttpRequest, run: AgentRun) -> None:
        # In the session's history, where one looks for who read it.
        log: Any = self.log_change
        log(request, run.session, f"Read run {run.run_id}.")

    def _session_url(self, request: HttpRequest, run: AgentRun) -> str:
        sessions = registered(self, AgentSession)
        # A site of the project's own may leave the sessions out.
        if sessions is None or not sessions.has_view_permission(request, run.session):
            return ""
        name = f"{self.admin_site.name}:agent_sessions_agentsession_change"
        return reverse(name, args=(run.session_id,))


def count_waiting(runs: AgentRunAdmin, request: HttpRequest) -> int:
    """Count the runs that wait for someone, of those that the reader may view."""
    rows = find_waiting(runs.get_queryset(request))
    if not runs.asks_rows():
        return rows.order_by().count()
    return len(runs.shown(request, rows.select_related("session__user")[:MOST_ASKED]))


def waiting_text(count: int) -> str:
    """Return how many runs wait for someone."""
    text = ngettext(
        "%(count)s run waits for approval.",
        "%(count)s runs wait for approval.",
        count,
    )
    return text % {"count": grouped(count)}
