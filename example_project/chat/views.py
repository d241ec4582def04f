"""The chat page and its way in."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model, login
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import get_script_prefix, reverse
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_POST

from example_project import model_choice
from example_project.chat.strings import strings


@login_required
@ensure_csrf_cookie
def chat(request: HttpRequest, session_id: str = "") -> HttpResponse:
    """Show the page; which conversation it is, the page's own requests find out."""
    page = {
        "urls": addresses(),
        "csrfCookie": settings.CSRF_COOKIE_NAME,
        "strings": strings(),
    }
    context = {"page": page, "model": model_choice.label()}
    return render(request, "chat/chat.html", context)


def addresses() -> dict[str, str]:
    """Return where the page's requests go; ID stands for a conversation's."""
    return {
        "chat": reverse("chat"),
        "conversation": reverse("conversation", args=["ID"]),
        "login": reverse("login"),
        "sessions": reverse("agent_sessions:sessions"),
        "session": reverse("agent_sessions:session", args=["ID"]),
        "messages": reverse("agent_sessions:messages", args=["ID"]),
        "socket": f"{get_script_prefix()}ws/agents/ID/",
    }


class SignIn(LoginView):
    """Ask who it is, and in the demo offer to be the demo user."""

    redirect_authenticated_user = True

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Return whether the one-click way in is open."""
        return super().get_context_data(demo_login=_demo_login(), **kwargs)


@require_POST
def sign_in_as_demo(request: HttpRequest) -> HttpResponse:
    """Log the visitor in as the demo user if ``make demo`` serves the page."""
    if not _demo_login():
        raise Http404
    user = get_user_model().objects.filter(username="demo", is_active=True).first()
    if user is None:
        raise Http404
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return redirect("chat")


def _demo_login() -> bool:
    return getattr(settings, "DEMO_LOGIN", False)
