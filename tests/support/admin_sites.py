"""Sites whose admins refuse single sessions, and what there is to see on them."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.contrib.auth.admin import UserAdmin
from django.contrib.auth.models import Permission
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import path, reverse

from agent_sessions.admin import AgentRunAdmin, AgentSessionAdmin
from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import RIGHTS, make, messages, staff
from tests.support.waiting import asked, wait


def is_ours(obj: AgentSession | None) -> bool:
    """The rule of all sites below. Asking for the owner must cost no query a row."""
    return obj is None or obj.user is None or obj.user.username != "them"


class OwnQueryset(AgentSessionAdmin):
    def get_queryset(self, request: HttpRequest) -> QuerySet[AgentSession]:
        return super().get_queryset(request).exclude(user__username="them")


class View(AgentSessionAdmin):
    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_view_permission(request, obj) and is_ours(obj)


class Read(AgentSessionAdmin):
    def has_read_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_read_permission(request, obj) and is_ours(obj)


class Clear(AgentSessionAdmin):
    def has_clear_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_clear_permission(request, obj) and is_ours(obj)


class Delete(AgentSessionAdmin):
    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_delete_permission(request, obj) and is_ours(obj)


class StockActions(Delete):
    """A project that names its own actions gets Django's own to delete."""

    actions = ()


class Stranger(admin.ModelAdmin):  # type: ignore[type-arg]
    """An admin of sessions that knows nothing of reading."""


class OneRun(AgentRunAdmin):
    """Runs have hooks of their own too."""

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        allowed = super().has_view_permission(request, obj)
        return allowed and (obj is None or is_ours(obj.session))


class OwnRuns(AgentRunAdmin):
    def get_queryset(self, request: HttpRequest) -> QuerySet[AgentRun]:
        rows = super().get_queryset(request)
        return rows.exclude(session__user__username="them")


def site_of(name: str, sessions: Any, runs: Any = AgentRunAdmin) -> admin.AdminSite:
    site = admin.AdminSite(name=name)
    if sessions:
        site.register(AgentSession, sessions)
    site.register(AgentRun, runs)
    site.register(get_user_model(), UserAdmin)
    return site


SITES = {
    name: site_of(name, *admins)
    for name, *admins in (
        ("queryset", OwnQueryset),
        ("view", View),
        ("read", Read),
        ("clear", Clear),
        ("delete", Delete),
        ("stock", StockActions),
        ("stranger", Stranger),
        ("alone", None),
        ("one run", AgentSessionAdmin, OneRun),
        ("own runs", AgentSessionAdmin, OwnRuns),
    )
}
urlpatterns = [
    path("admin/", admin.site.urls),
    *(path(f"{name.replace(' ', '-')}/", site.urls) for name, site in SITES.items()),
]
HIDING = ("queryset", "view")


class World:
    """One session of ours and one of theirs, with a run each."""

    def __init__(self) -> None:
        make_user = get_user_model().objects.create_user
        self.us, self.them = make_user("us"), make_user("them")
        self.ours = self.make("ours", self.us)
        self.theirs = self.make("theirs", self.them)
        self.client = staff(*RIGHTS, runs=True)
        user = get_user_model().objects.get(username="staff")
        users = Permission.objects.filter(codename__in=("view_user", "delete_user"))
        user.user_permissions.add(*users)

    def make(self, name: str, user: Any) -> AgentSession:
        row = make(f"{name}-id", user=user)
        AgentSession.objects.filter(pk=row.pk).update(input_tokens=77)
        wait(
            row,
            f"{name}-run",
            interrupts=asked(f"{name}-tool", f'"{name}-argument"'),
            first_position=1,
            last_position=2,
            usage={f"{name}-usage": 1},
        )
        return row

    def get(self, site: str, name: str, *args: Any, **query: str) -> Any:
        return self.client.get(at(site, name, *args) + f"?{urlencode(query)}")

    def act(self, site: str, action: str, **more: str) -> Any:
        rows = (self.ours.pk, self.theirs.pk)
        data = {"action": action, "_selected_action": rows, **more}
        return self.client.post(at(site, "agentsession_changelist"), data)

    def told(self) -> list[str]:
        response = self.client.get(reverse("admin:agent_sessions_agentrun_changelist"))
        return messages(response)


def at(site: str, name: str, *args: Any) -> str:
    return reverse(f"{site}:agent_sessions_{name}", args=args)


def text(response: Any) -> str:
    found: bytes = (
        b"".join(response.streaming_content) if response.streaming else response.content
    )
    return found.decode()
