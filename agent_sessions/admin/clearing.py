"""Clear and delete from the admin: confirmed, logged, failures told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.actions import delete_selected as confirm_deletion
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import unquote
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.text import capfirst
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from agent_sessions.admin.rules import Rows, SessionRules, address
from agent_sessions.approvals import find_states
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentSession
from agent_sessions.retention import Removal, Spared, finish_removals, remove

# Sessions that a page or message names; more are counted.
NAMED = 20
_DELETION = Removal(delete=True, waiting=True, running=True)


class ClearingMixin(SessionRules):
    """What changes sessions in the admin: clear the history, delete."""

    # -- clear ---------------------------------------------------------------------

    @admin.action(
        permissions=["clear"],
        description=gettext_lazy("Clear selected %(verbose_name_plural)s"),
    )
    def clear_history(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponse | None:
        """Empty the selected sessions, once that is confirmed."""
        rows = self.permitted(request, queryset, "clear")
        if rows and not _is_confirmed(request, rows):
            return self._confirm(request, rows, "clear_history")
        self._clear(request, rows)
        return None

    def clear_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Empty one session, once that is confirmed."""
        obj = self.get_allowed(request, object_id, "clear")
        if obj is None:
            return self._get_obj_does_not_exist_redirect(  # type: ignore[attr-defined,no-any-return]
                request, self.opts, object_id
            )
        if not _is_confirmed(request, [obj]):
            return self._confirm(request, [obj])
        self._clear(request, [obj])
        return HttpResponseRedirect(address(self, "change", obj.pk))

    def _confirm(
        self, request: HttpRequest, rows: list[AgentSession], action: str = ""
    ) -> TemplateResponse:
        """Ask on a page; without an action, it is one session's own."""
        across = _is_across(request)
        is_deletion = action == "delete_selected"
        waiting = _count_waiting(rows)
        context = {
            **self.admin_site.each_context(request),
            "title": _("Delete sessions") if is_deletion else _("Clear history"),
            "is_deletion": is_deletion,
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
            "back": address(self, "change", rows[0].pk) if rows and not action else "",
            "media": self.media,
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request,
            "admin/agent_sessions/agentsession/confirmation.html",
            context,
        )

    def _clear(self, request: HttpRequest, rows: list[AgentSession]) -> None:
        if cleared := self._remove(request, rows, Removal(waiting=True)):
            text = ngettext(
                "Cleared %(sessions)d session with %(items)d items.",
                "Cleared %(sessions)d sessions with %(items)d items.",
                len(cleared),
            ) % {"sessions": len(cleared), "items": sum(cleared)}
            self.message_user(request, text, messages.SUCCESS)

    # -- delete --------------------------------------------------------------------

    @admin.action(
        permissions=["delete"],
        description=gettext_lazy("Delete selected %(verbose_name_plural)s"),
    )
    def delete_selected(
        self, request: HttpRequest, queryset: Rows
    ) -> HttpResponse | None:
        """Delete the selected sessions in their stores, then their rows."""
        rows = self.permitted(request, queryset, "delete")
        across = _is_across(request)
        if (rows and not request.POST.get("post")) or (
            across and not _is_told(request, rows)
        ):
            *_rest, lacking, protected = self.get_deleted_objects(rows, request)
            if lacking or protected:
                # Django's page says why it can't be done.
                return confirm_deletion(self, request, queryset)
            return self._confirm(request, rows, "delete_selected")
        if deleted := len(self._remove(request, rows, _DELETION)):
            text = ngettext("Deleted %d session.", "Deleted %d sessions.", deleted)
            self.message_user(request, text % deleted, messages.SUCCESS)
        return None

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
        remove(obj, _DELETION)

    def delete_queryset(self, request: HttpRequest, queryset: Rows) -> None:
        rows: Iterable[AgentSession] = list(queryset)
        # The right has been asked for by whoever calls this; rows have not.
        if self.has_rules("view", "delete"):
            rows = self.permitted(request, rows, "delete")
        for row in rows:
            remove(row, _DELETION)

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Count what would go: listing it takes seconds for one long session."""
        rows: list[AgentSession] = self.shown(request, objs)
        names = [
            f"{capfirst(self.opts.verbose_name)}: {self.label(request, row)}"
            for row in rows[:NAMED]
        ]
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

    # -- shared --------------------------------------------------------------------

    def _remove(
        self, request: HttpRequest, rows: list[AgentSession], how: Removal
    ) -> list[int]:
        """Remove sessions, log it and tell what is left; return the items of each."""
        counts: list[int] = []
        busy: list[str] = []
        for row in rows:
            try:
                with transaction.atomic(row._state.db):
                    if how.delete:
                        alone = self.get_queryset(request).filter(pk=row.pk)
                        self.log_deletions(request, alone)
                    count = remove(row, how) or 0
                    if not how.delete:
                        self.log_change(request, row, f"Cleared {count} items.")
            except Spared:
                busy.append(self.label(request, row))
            except AgentSessionError as exc:
                self._tell_failure(request, row, exc)
            else:
                counts.append(count)
        finish_removals()
        if busy:
            text = _("Not cleared, because a run is active: %(names)s.")
            more = ["…"] if len(busy) > NAMED else []
            names = ", ".join([*busy[:NAMED], *more])
            self.message_user(request, text % {"names": names}, messages.WARNING)
        return counts

    def _tell_failure(
        self, request: HttpRequest, row: AgentSession, exc: AgentSessionError
    ) -> None:
        text = _("%(name)s was left as it is: %(error)s")
        name = self.label(request, row)
        self.message_user(request, text % {"name": name, "error": exc}, messages.ERROR)


def _is_confirmed(request: HttpRequest, rows: list[AgentSession]) -> bool:
    """Return whether the reader has agreed to clear as many sessions as there are.

    The page also says how many of them wait for an approval, and asks again where one
    has begun to wait since.
    """
    if "post" not in request.POST or not _is_told(request, rows):
        return False
    told = request.POST.get("waiting")
    return told is None or told == str(_count_waiting(rows))


def _is_told(request: HttpRequest, rows: list[AgentSession]) -> bool:
    """Return whether the reader was told of as many sessions as there are."""
    return request.POST.get("count") == str(len(rows))


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
