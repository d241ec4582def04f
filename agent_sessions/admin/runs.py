"""The runs of agents: a list, and one run with what it used and wrote."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.options import BaseModelAdmin
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from agent_sessions.admin.addresses import link, registered
from agent_sessions.admin.layout import grouped, how_long, in_words, lay_out
from agent_sessions.admin.lists import CappedPaginator, StartedFilter
from agent_sessions.admin.reading import History
from agent_sessions.admin.rules import (
    MOST_ASKED,
    RuledAdmin,
    SessionRules,
    database,
    has_own,
    hides,
    may,
    narrowed,
)
from agent_sessions.admin.transcript import PAGE_LENGTH, item_url, owner_url
from agent_sessions.approvals import find_open
from agent_sessions.approvals import waiting as find_waiting
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.transcript.parts import json_part, maybe_json, objects, string
from agent_sessions.usage import COUNTERS

# Columns that narrow a list down to what has an order of its own.
_FEW = {"session", "session_id", "branch", "branch_id"}


def approvals(runs: Iterable[AgentRun]) -> dict[int, list[dict[str, Any]]]:
    """Read the open approvals of runs, by the runs' keys, in a fixed number of queries.

    What was changed, answered, moved here or is over is left out, and so is what is
    no approval.
    """
    waiting = [run for run in runs if run.status == AgentRun.Status.WAITING]
    if not waiting:
        return {}
    rows = AgentRun.objects.using(waiting[0]._state.db)
    found, zone = {}, timezone.get_current_timezone()
    for run, paused in find_open(rows.filter(pk__in=[run.pk for run in waiting])):
        asked = found[run.pk] = list[dict[str, Any]]()
        for interrupt in objects(paused.interrupts):
            about: Any = interrupt.get("metadata")
            about = about if isinstance(about, dict) else {}
            asked.append(
                {
                    "call_id": string(interrupt.get("toolCallId")),
                    "tool": string(about.get("toolName")),
                    "arguments": maybe_json(about.get("arguments")),
                    "expires_at": datetime.fromtimestamp(paused.expires_at, zone),
                }
            )
    return found


@admin.register(AgentRun)
class AgentRunAdmin(RuledAdmin):
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
    # Keys ascend with time, and every database has them in order.
    ordering = ("-pk",)
    sortable_by = ()
    search_fields = ("run_id__exact", "session__session_id__exact")
    search_help_text = _("The whole id of a run or of a session.")
    actions = None

    # -- permissions ---------------------------------------------------------------

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
        return super().asks_rows() or (
            sessions is not None
            and has_own(sessions, "has_view_permission", RuledAdmin, BaseModelAdmin)
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

    def get_ordering(self, request: HttpRequest) -> Any:
        # The index that finds a status has it by time, the one of a session by key.
        is_ours = self.ordering == AgentRunAdmin.ordering
        columns = {name.partition("__")[0] for name in request.GET}
        if is_ours and "status" in columns and columns.isdisjoint(_FEW):
            return ("-started_at", "-pk")
        return super().get_ordering(request)

    def search(self, rows: QuerySet[Any], path: str, terms: list[str]) -> Q:
        if path == "run_id__exact":
            found = AgentRun._base_manager.using(rows.db).filter(run_id__in=terms)
            return Q(pk__in=list(found.values_list("pk", flat=True)[:MOST_ASKED]))
        if path == "session__session_id__exact":
            sessions = AgentSession.objects.using(rows.db).filter(session_id__in=terms)
            return Q(session_id__in=list(sessions.values_list("pk", flat=True)))
        return super().search(rows, path, terms)

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
        tools = ", ".join(approval["tool"] for approval in asked)
        return format_html("{} <code>{}</code>", words, tools) if tools else words

    @admin.display(description=_("duration"), empty_value="-")
    def duration(self, obj: AgentRun) -> str | None:
        return how_long(obj.started_at, obj.finished_at) or None

    # -- one run -------------------------------------------------------------------

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
            "counts": self.counts(run, *COUNTERS, "total_tokens"),
            "status": self.status_in_words(run),
            "duration": self.duration(run),
            "approvals": asked,
            # Whatever a provider writes there is not ours to vouch for.
            "usage": [json_part(run.usage)] if run.usage and may_see else [],
            "session_url": link(self, request, AgentSession, run.session),
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
        return {
            "lines": lay_out(items, (), item_url(self, run.session, history.chosen)),
            "has_more": bool(items) and items[-1].position < last and page.has_later,
        }

    def _log_reading(self, request: HttpRequest, run: AgentRun) -> None:
        # In the session's history, where one looks for who read it.
        log: Any = self.log_change
        log(request, run.session, f"Read run {run.run_id}.")


def count_waiting(runs: AgentRunAdmin, request: HttpRequest) -> int:
    """Count the runs that wait for someone, of those that the reader may view."""
    rows = find_waiting(runs.get_queryset(request))
    if not runs.asks_rows():
        return rows.order_by()[: CappedPaginator.limit + 1].count()
    return len(runs.shown(request, rows.select_related("session__user")[:MOST_ASKED]))


def waiting_text(count: int) -> str:
    """Return how many runs wait for someone; very many are not counted."""
    most = CappedPaginator.limit
    shown = f"{grouped(most)}+" if count > most else grouped(count)
    text = ngettext(
        "%(count)s run waits for approval.",
        "%(count)s runs wait for approval.",
        count,
    )
    return text % {"count": shown}
