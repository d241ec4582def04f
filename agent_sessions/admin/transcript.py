"""One session in the admin: its page, and its items as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from django.contrib.auth import get_user_model
from django.http import Http404, HttpRequest, HttpResponse

from agent_sessions.admin.addresses import MAX_KEY, address, as_key, link, registered
from agent_sessions.admin.layout import grouped, in_words, lay_out
from agent_sessions.admin.reading import History
from agent_sessions.admin.rules import SessionRules
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import clean_text
from agent_sessions.models import AgentRun, AgentSession, Branch
from agent_sessions.transcript import Kind
from agent_sessions.usage import COUNTERS

PAGE_LENGTH = 100
# Characters of an item that a browser is to show; more is a download.
RAW_LENGTH = 2_000_000
_NAME_LENGTH: int = Branch._meta.get_field("name").max_length or 0


class TranscriptMixin(SessionRules):
    """The page of a session: what is known of it, and what was said."""

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
        runs_url = link(self, request, AgentRun)
        context |= {
            "owner_url": owner_url(self, request, obj),
            "counts": self.counts(obj, *COUNTERS),
            "item_count": grouped(obj.item_count),
            "state": in_words(obj.state, obj.get_state_display()),
            "has_clear_permission": self.allows(request, "clear", obj),
            "has_read_permission": self.allows(request, "read", obj),
            "all_runs_url": runs_url,
            "runs_url": runs_url and f"{runs_url}?session__id__exact={obj.pk}",
        }
        if context["has_read_permission"]:
            context["subtitle"] = obj.title or obj.session_id
            try:
                context |= self._transcript(request, obj)
            except AgentSessionError as exc:
                context["transcript_error"] = str(exc)
        return super().render_change_form(request, context, *args, **kwargs)

    def item_view(
        self, request: HttpRequest, object_id: str, position: int
    ) -> HttpResponse:
        """Return one item as it is stored, as plain text; a very long one to keep."""
        obj = self.get_allowed(request, object_id, "read")
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
        """Read a page of the history. Raises what the store raises."""
        history = History(obj, _branch(request))
        before = as_key(request.GET.get("before", ""))
        after = as_key(request.GET.get("after", "")) if before is None else None
        page = history.page(before=before, after=after, limit=PAGE_LENGTH)
        context: dict[str, Any] = {
            "lines": [],
            "branch": history.chosen,
            "branches": [
                (each, _link(request, each.label if each.pk != obj.branch_id else None))
                for each in history.branches
            ],
        }
        if page.has_later or (not page.items and (before, after) != (None, None)):
            context["newest_url"] = _link(request)
        if not page.items:
            return context
        first, last = page.items[0].position, page.items[-1].position
        lines = lay_out(
            page.items, history.runs(first, last), item_url(self, obj, history.chosen)
        )
        alone = [each for each in lines if each.line.entry.kind is Kind.OUTPUT]
        calls = history.calls({each.line.entry.call_id for each in alone} - {""}, first)
        for each in alone:
            if position := calls.get(each.line.entry.call_id):
                place = _link(request, after=position - 1)
                each.call_url = f"{place}#item-{position}"
        self.log_change(request, obj, f"Read items {first} to {last}.")
        if page.has_earlier:
            context["earlier_url"] = _link(request, before=first)
        if page.has_later:
            context["later_url"] = _link(request, after=last)
        return {**context, "lines": lines}


def item_url(
    model_admin: Any, obj: AgentSession, branch: Branch | None
) -> Callable[[int], str]:
    """Return what makes the address of an item's raw form from its position."""
    # One look-up serves a page's hundreds of links.
    sessions = registered(model_admin, AgentSession)
    start = address(sessions, "item", obj.pk, 0).removesuffix("0/")
    end = "/" if branch is None else f"/?{urlencode({'branch': branch.label})}"
    return lambda position: f"{start}{position}{end}"


def owner_url(model_admin: Any, request: HttpRequest, obj: AgentSession) -> str:
    """Return the address of the owner's page, for those who may see users."""
    if obj.user is None:
        return ""
    return link(model_admin, request, get_user_model(), obj.user)


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
