"""Who may do what: metadata and contents are different secrets."""

from __future__ import annotations

from django.http import HttpRequest

APP = "agent_sessions"


def may(request: HttpRequest, right: str, model: str = "agentsession") -> bool:
    """Tell whether the reader has exactly this right on a model.

    Django's own look-ups let those who may change also view; nobody changes these.
    """
    return request.user.has_perm(f"{APP}.{right}_{model}")


def may_read(request: HttpRequest) -> bool:
    """Tell whether the reader may see what was said."""
    return may(request, "view") and may(request, "read")
