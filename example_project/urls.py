"""Addresses of the demo."""

from __future__ import annotations

from django.contrib import admin
from django.contrib.auth.views import LogoutView
from django.urls import include, path

from agent_sessions.views import SessionMessagesView
from example_project.chat import views
from example_project.options import STREAM_OPTIONS
from example_project.runs import SupportRuns

urlpatterns = [
    path("", views.chat, name="chat"),
    path("c/<str:session_id>/", views.chat, name="conversation"),
    path("login/", views.SignIn.as_view(), name="login"),
    path("login/demo/", views.sign_in_as_demo, name="login-demo"),
    path("logout/", LogoutView.as_view(), name="logout"),
    # Before the include: earlier messages show as much as the websocket does.
    path(
        "agents/sessions/<str:session_id>/messages/",
        SessionMessagesView.as_view(stream_options=STREAM_OPTIONS),
    ),
    path("agents/", include("agent_sessions.urls")),
    path(
        "agents/sessions/<str:session_id>/",
        include(SupportRuns.as_urls(stream_options=STREAM_OPTIONS)),
    ),
    path("admin/", admin.site.urls),
]
