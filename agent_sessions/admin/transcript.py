"""One session in the admin: its page, and its items as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from django.contrib.admin.utils import unquote
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import reverse

from agent_sessions.admin.formatting import grouped, in_words
from agent_sessions.admin.layout import lay_out
from agent_sessions.admin.permissions import registered
from agent_sessions.admin.reading import History
from agent_sessions.admin.rules import MAX_KEY, as_key
from agent_sessions.admin.session_rules import SessionRules
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import clean_text
from agent_sessions.models import AgentRun, AgentSession, Branch
from agent_sessions.transcript import Kind

PAGE_LENGTH = 100
# Characters of an item that a browser is to show; more is a download.
RAW_LENGTH = 2_000_000
_NAME_LENGTH: int = Branch._meta.get_field("name").max_length or 0
_COUNTS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
)


class TranscriptMixin(SessionRules):
    """The page of a session: what is known of it, and what was said."""

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        # The page has no form; its template shows header and transcript.
        return ()

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> HttpResponse:
        obj: AgentSession = kwargs["obj"]
        # Shown, never saved.
        obj.state = find_states([obj])[obj.pk]
        context |= {
            "owner_url": owner_url(self, request, obj),
            "counts": [
                (self.opts.get_field(name).verbose_name, grouped(getattr(obj, name)))  # type: ignore[union-attr]
                for name in _COUNTS
            ],
            "item_count": grouped(obj.item_count),
            "state": in_words(obj.state, obj.get_state_display()),
            "has_clear_permission": self.allows(request, "clear", obj),
            "has_read_permission": self.allows(request, "read", obj),
            "runs_url": _runs_of(runs_url(self, request), obj),
        }
        if context["has_read_permission"]:
            context["subtitle"] = obj.title or obj.session_id
            context |= self._transcript(request, obj)
        return super().render_change_form(request, context, *args, **kwargs)

    def item_view(
        self, request: HttpRequest, object_id: str, position: int
    ) -> HttpResponse:
        """Return one item as it is stored, as plain text; a very long one to keep."""
        obj = self.get_object(request, unquote(object_id))
        if not self.allows(request, "read", obj):
            raise PermissionDenied
        if obj is None or position >= MAX_KEY:
            raise Http404
        try:
            item = History(obj, _branch(request)).item(position)
        except AgentSessionError as exc:
            raise Http404(str(exc)) from exc
        if item is None:
            raise Http404
        self.log_change(request, obj, f"Read item {position}.")
        headers = {
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox",
        }
        if len(item.raw) > RAW_LENGTH:
            headers["Content-Disposition"] = f'attachment; filename="{position}.json"'
        return HttpResponse(
            clean_text(item.raw),
            content_type="text/plain; charset=utf-8",
            headers=headers,
        )

    def _transcript(self, request: HttpRequest, obj: AgentSession) -> dict[str, Any]:
        history = History(obj, _branch(request))
        before = as_key(request.GET.get("before", ""))
        after = as_key(request.GET.get("after", "")) if before is None else None
        try:
            page = history.page(before=before, after=after, limit=PAGE_LENGTH)
            items, branches = page.items, history.branches
            runs = history.runs(items[0].position, items[-1].position) if items else []
            chosen = history.chosen
            lines = lay_out(
                items, runs, item_url(self, obj, chosen.name if chosen else None)
            )
            alone = [s for s in lines if s.line.entry.kind is Kind.OUTPUT]
            ids = {shown.line.entry.call_id for shown in alone} - {""}
            calls = history.calls(ids, items[0].position) if items else {}
        except AgentSessionError as exc:
            return {"transcript_error": str(exc)}
        for shown in alone:
            if position := calls.get(shown.line.entry.call_id):
                place = _link(request, after=position - 1)
                shown.call_url = f"{place}#item-{position}"
        elsewhere = page.has_later or (not items and (before, after) != (None, None))
        context = {
            "lines": lines,
            "all_runs_url": runs_url(self, request),
            "newest_url": _link(request) if elsewhere else "",
            "branch": chosen,
            "branches": [
                (choice, _link(request, None if choice.is_current else choice.name))
                for choice in branches
            ],
        }
        if items:
            first, last = items[0].position, items[-1].position
            self.log_change(request, obj, f"Read items {first} to {last}.")
            if page.has_earlier:
                context["earlier_url"] = _link(request, before=first)
            if page.has_later:
                context["later_url"] = _link(request, after=last)
        return context


def runs_url(site_admin: Any, request: HttpRequest) -> str:
    """Return the address of the list of runs, for those who may see it."""
    runs = registered(site_admin, AgentRun)
    # A site of the project's own may leave the runs out.
    if runs is None or not runs.has_view_permission(request):
        return ""
    return reverse(f"{site_admin.admin_site.name}:agent_sessions_agentrun_changelist")


def _runs_of(address: str, obj: AgentSession) -> str:
    return f"{address}?session__id__exact={obj.pk}" if address else ""


def item_url(
    site_admin: Any, obj: AgentSession, branch: str | None = None
) -> Callable[[int], str]:
    """Return what makes the address of an item's raw form from its position."""
    name = f"{site_admin.admin_site.name}:agent_sessions_agentsession_item"
    # One look-up serves a page's hundreds of links.
    start = reverse(name, args=(obj.pk, 0)).removesuffix("0/")
    end = f"/?{urlencode({'branch': branch})}" if branch else "/"
    return lambda position: f"{start}{position}{end}"


def owner_url(site_admin: Any, request: HttpRequest, obj: AgentSession) -> str:
    """Return the address of the owner's page, for those who may see users."""
    users = registered(site_admin, get_user_model())
    if users is None or obj.user_id is None:
        return ""
    if not users.has_view_permission(request, obj.user):
        return ""
    name = f"{users.opts.app_label}_{users.opts.model_name}_change"
    return reverse(f"{site_admin.admin_site.name}:{name}", args=(obj.user_id,))


def _branch(request: HttpRequest) -> str:
    """Read the branch's name in a link; a name that none can have is no name."""
    name = request.GET.get("branch", "")
    return "" if "\x00" in name or len(name) > _NAME_LENGTH else name


def _link(request: HttpRequest, branch: str | None = "", **place: int) -> str:
    """Return the address of another place in the same history.

    `branch` is another branch's name, or None for the session's current one.
    """
    query = request.GET.copy()
    for name in ("before", "after", *(() if branch == "" else ("branch",))):
        query.pop(name, None)
    query.update({name: str(position) for name, position in place.items()})
    if branch:
        query["branch"] = branch
    return f"?{query.urlencode()}"
