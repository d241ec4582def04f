"""Routes of the chat page's HTTP: `path("agents/", include("agent_sessions.urls"))`."""

from __future__ import annotations

from django.urls import path

from agent_sessions.views import SessionListView, SessionMessagesView, SessionView

app_name = "agent_sessions"

urlpatterns = [
    path("sessions/", SessionListView.as_view(), name="sessions"),
    path("sessions/<str:session_id>/", SessionView.as_view(), name="session"),
    path(
        "sessions/<str:session_id>/messages/",
        SessionMessagesView.as_view(),
        name="messages",
    ),
]
