"""Who may do what: metadata and contents are different secrets.

A right says what someone may do at all, a hook of a ModelAdmin says it of one row. A
project that registers a subclass has hooks of its own: every door asks them with the
row, and what may not be viewed does not exist.
"""

from __future__ import annotations

from typing import Any

from django.contrib.admin.exceptions import NotRegistered
from django.db.models import Model, QuerySet
from django.http import HttpRequest

from agent_sessions.models import AgentSession

APP = "agent_sessions"
# Rows that a project's hook is asked for where rows are counted.
MOST_ASKED = 1_000


def may(request: HttpRequest, right: str, model: str = "agentsession") -> bool:
    """Return whether the reader has exactly this right on a model.

    Django's own look-ups let those who may change also view; nobody changes these.
    """
    return request.user.has_perm(f"{APP}.{right}_{model}")


def registered(model_admin: Any, model: type[Model]) -> Any:
    """Return the ModelAdmin that the same site has for a model, or None."""
    try:
        return model_admin.admin_site.get_model_admin(model)
    except NotRegistered:
        return None


def hides(model_admin: Any, request: HttpRequest, row: Any) -> bool:
    """Return whether a hook refuses one row to someone who may view others."""
    view = model_admin.has_view_permission
    return view(request) and not view(request, row)


def has_own(model_admin: Any, hook: str, *bases: type) -> bool:
    """Return whether a hook is other than those of these classes: a project's own."""
    function = getattr(getattr(model_admin, hook), "__func__", None)
    return function not in [getattr(base, hook) for base in bases]


def narrowed(model_admin: Any, request: HttpRequest) -> QuerySet[Any] | None:
    """Return the sessions that a ModelAdmin narrows its pages to; None if to none.

    All of them as a subquery would cost a list of a million runs its index.
    """
    rows: QuerySet[Any] = model_admin.get_queryset(request).order_by()
    plain = AgentSession.objects.all().query
    return None if rows.query.where == plain.where else rows
