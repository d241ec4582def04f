"""Clear and delete from the admin: confirmed, logged, failures told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, DELETION, LogEntry
from django.contrib.admin.utils import unquote
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.text import capfirst
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from agent_sessions.admin.addresses import address
from agent_sessions.admin.lists import CappedPaginator
from agent_sessions.admin.rules import Rows, SessionRules
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession
from agent_sessions.retention import (
    Removal,
    Spared,
    finish_later,
    finish_removals,
    remove,
    remove_all,
)

# Sessions that a page or message names; more are counted.
NAMED = 20
# Sessions that are logged together.
LOGGED = 50
# Columns that are shown of them, and that their removal asks for.
_NEEDED = ("backend", "session_id", "user_id", "title", "item_count", "state")
# What may look at others.
_HOOKS = ("view", "read", "clear", "delete")
_CLEAR = Removal(waiting=True)
_DELETE = Removal(delete=True, waiting=True, running=True)


class ClearingMixin(SessionRules):
    """What changes sessions in the admin: clear the history, delete."""

    @admin.action(
        permissions=["clear"],
        description=gettext_lazy("Clear selected %(verbose_name_plural)s"),
    )
    def clear_history(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponse | None:
        """Empty the selected sessions, once that is confirmed."""
        return self._act(request, queryset, _CLEAR, "clear_history")

    @admin.action(
        permissions=["delete"],
        description=gettext_lazy("Delete selected %(verbose_name_plural)s"),
    )
    def delete_selected(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponse | None:
        """Delete the selected sessions in their stores, then their rows."""
        return self._act(request, queryset, _DELETE, "delete_selected")

    def clear_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Empty one session, once that is confirmed."""
        obj = self.get_allowed(request, object_id, "clear")
        if obj is None:
            # That page says that there is no such session.
            return HttpResponseRedirect(address(self, "change", unquote(object_id)))
        page = self._act(request, [obj], _CLEAR)
        return page or HttpResponseRedirect(address(self, "change", obj.pk))

    def delete_view(
        self,
        request: HttpRequest,
        object_id: str,
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        try:
            return super().delete_view(request, object_id, extra_context)
        except AgentSessionError as exc:
            # The log entry was rolled back with everything else.
            row = self.get_queryset(request).get(pk=unquote(object_id))
            self._tell_failure(request, row, exc)
            return HttpResponseRedirect(address(self, "change", row.pk))

    def delete_model(self, request: HttpRequest, obj: AgentSession) -> None:
        using = str(obj._state.db)
        remove(obj, _DELETE)
        finish_later(using=using)

    def delete_queryset(self, request: HttpRequest, queryset: Rows) -> None:
        rows: Iterable[AgentSession] = list(queryset)
        # The right has been asked for by whoever calls this; rows have not.
        if self.has_rules("view", "delete"):
            rows = self.permitted(request, rows, "delete")
        for row in rows:
            self.delete_model(request, row)

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Count what would go: listing it takes seconds for one long session."""
        rows: list[AgentSession] = self.shown(request, objs)
        name = capfirst(self.opts.verbose_name)
        names = [f"{name}: {self.label(request, row)}" for row in rows[:NAMED]]
        if more := len(rows) - len(names):
            names.append(ngettext("and %d more", "and %d more", more) % more)
        if warning := _warning(_count_waiting(rows)):
            names.insert(0, warning)
        counts = {
            str(self.opts.verbose_name_plural): len(rows),
            _("items"): sum(row.item_count for row in rows),
        }
        asked = objs if self.has_rules("view", "delete") else [None]
        may_delete = all(self.has_delete_permission(request, row) for row in asked)
        lacking = set() if may_delete else {str(self.opts.verbose_name)}
        return names, counts, lacking, []

    # -- both ----------------------------------------------------------------------

    def _act(
        self,
        request: HttpRequest,
        sessions: Rows | list[AgentSession],
        how: Removal,
        action: str = "",
    ) -> HttpResponse | None:
        """Ask, or do it where that is confirmed; without an action, to one session."""
        if isinstance(sessions, QuerySet) and not self.has_rules(*_HOOKS):
            # Of thousands, whole rows with their owners take half a second.
            sessions = sessions.select_related(None).only(*_NEEDED)
        rows = self.few(request, sessions, CappedPaginator.limit)
        rows = self.permitted(request, rows, "delete" if how.delete else "clear")
        if rows and not _is_confirmed(request, rows):
            return self._confirm(request, rows, how, action)
        removed, items = self._remove(request, rows, how)
        if removed and how.delete:
            text = ngettext("Deleted %d session.", "Deleted %d sessions.", removed)
            self.message_user(request, text % removed, messages.SUCCESS)
        elif removed:
            text = ngettext(
                "Cleared %(sessions)d session with %(items)d items.",
                "Cleared %(sessions)d sessions with %(items)d items.",
                removed,
            ) % {"sessions": removed, "items": items}
            self.message_user(request, text, messages.SUCCESS)
        return None

    def _confirm(
        self, request: HttpRequest, rows: list[AgentSession], how: Removal, action: str
    ) -> TemplateResponse:
        across = _is_across(request)
        waiting = _count_waiting(rows)
        context = {
            **self.admin_site.each_context(request),
            "title": _("Delete sessions") if how.delete else _("Clear history"),
            "is_deletion": how.delete,
            "subtitle": None,
            "opts": self.opts,
            "totals": {
                "sessions": len(rows),
                "items": sum(row.item_count for row in rows),
                "owners": len({row.user_id for row in rows} - {None}),
            },
            "named": [self.label(request, row) for row in rows[:NAMED]],
            "waiting": waiting,
            "warning": _warning(waiting),
            "more": max(len(rows) - NAMED, 0),
            "action": action,
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
            # One key stands for all where all were selected: thousands would be
            # more fields than Django takes.
            "keys": [row.pk for row in (rows[:1] if across else rows)],
            "select_across": across,
            "back": "" if action else address(self, "change", rows[0].pk),
            "media": self.media,
        }
        request.current_app = self.admin_site.name
        template = "admin/agent_sessions/agentsession/confirmation.html"
        return TemplateResponse(request, template, context)

    def _remove(
        self, request: HttpRequest, rows: list[AgentSession], how: Removal
    ) -> tuple[int, int]:
        """Remove sessions, log it and tell what is left; count sessions and items."""
        removed, items = 0, 0
        done: list[tuple[AgentSession, int]] = []
        busy: list[str] = []
        try:
            for row, outcome in remove_all(rows, how):
                if isinstance(outcome, Spared):
                    busy.append(self.label(request, row))
                elif isinstance(outcome, AgentSessionError):
                    self._tell_failure(request, row, outcome)
                elif outcome is not None:
                    removed, items = removed + 1, items + outcome
                    done.append((row, outcome))
                if len(done) == LOGGED:
                    _log(request, done, how)
        finally:
            _log(request, done, how)
        finish_removals()
        if busy:
            text = _("Not cleared, because a run is active: %(names)s.")
            more = ["…"] if len(busy) > NAMED else []
            names = ", ".join([*busy[:NAMED], *more])
            self.message_user(request, text % {"names": names}, messages.WARNING)
        return removed, items

    def _tell_failure(
        self, request: HttpRequest, row: AgentSession, exc: AgentSessionError
    ) -> None:
        text = _("%(name)s was left as it is: %(error)s")
        name = self.label(request, row)
        self.message_user(request, text % {"name": name, "error": exc}, messages.ERROR)


def _log(
    request: HttpRequest, done: list[tuple[AgentSession, int]], how: Removal
) -> None:
    """Write down what was done to sessions, and forget it here."""
    user: Any = request.user.pk
    told: dict[str, list[Any]] = {}
    for row, items in done:
        message = "" if how.delete else f"Cleared {items} items."
        told.setdefault(message, []).append(row)
    for message, rows in told.items():
        deed = DELETION if how.delete else CHANGE
        LogEntry.objects.log_actions(user, rows, deed, message)
    done.clear()


def _is_confirmed(request: HttpRequest, rows: list[AgentSession]) -> bool:
    """Return whether the reader has agreed to do it to as many sessions as there are.

    The page also says how many of them wait for an approval, and asks again where one
    has begun to wait since.
    """
    if "post" not in request.POST:
        return False
    count = request.POST.get("count", "" if _is_across(request) else str(len(rows)))
    waiting = request.POST.get("waiting")
    return count == str(len(rows)) and (
        waiting is None or waiting == str(_count_waiting(rows))
    )


def _is_across(request: HttpRequest) -> bool:
    """Return whether all sessions of the list were selected, not only a page's."""
    return request.POST.get("select_across") == "1"


def _count_waiting(rows: list[AgentSession]) -> int:
    states = find_states(rows)
    return sum(state == AgentSession.State.WAITING for state in states.values())


def _warning(count: int) -> str:
    """Return what is withdrawn with sessions of which so many wait; "" if none does."""
    if not count:
        return ""
    text = ngettext(
        "%(count)d session waits for an approval, which nobody can give any more then.",
        "%(count)d sessions wait for approvals, which nobody can give any more then.",
        count,
    )
    return text % {"count": count}
