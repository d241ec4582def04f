"""Readers, rows and pages for the tests of the admin."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.test import Client
from django.urls import reverse

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentRun, AgentSession

LIST = "admin:agent_sessions_agentsession_changelist"
RIGHTS = ("view", "read", "clear", "delete", "add", "change")
XSS = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7|add:7 }}&amp;"


def make(
    session_id: str = "chat", *items: Any, user: Any = None, **fields: Any
) -> AgentSession:
    batch = items or (
        {"role": "user", "content": f"First line of {session_id}"},
        {"role": "assistant", "content": "An answer"},
    )
    alias = fields.pop("backend", "default")
    sessions[alias].append(SessionKey(session_id, user and user.pk), batch)
    rows = AgentSession.objects.filter(backend=alias, session_id=session_id)
    rows.update(**fields) if fields else None
    return rows.get()


def make_run(row: AgentSession, **fields: Any) -> AgentRun:
    given = {"run_id": "run-1", "branch": row.branch, "status": "completed"}
    return AgentRun.objects.create(session=row, **{**given, **fields})


def staff(*rights: str, name: str = "staff", runs: bool = False) -> Client:
    """Log in someone with these rights on sessions, and to view runs."""
    user = get_user_model().objects.create_user(name, password="x", is_staff=True)
    names = [f"{right}_agentsession" for right in rights]
    names += ["view_agentrun"] if runs else []
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    client = Client()
    client.force_login(user)
    return client


def url(name: str, row: AgentSession, *args: Any) -> str:
    return reverse(f"admin:agent_sessions_agentsession_{name}", args=(row.pk, *args))


def page(client: Client, address: str, status: int = 200) -> str:
    response = client.get(address)
    assert response.status_code == status
    return response.content.decode()


def messages(response: Any) -> list[str]:
    return [str(message) for message in response.context["messages"]]


class Markup(HTMLParser):
    """Collect what could run in a browser, and the ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.inline: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "script" and "src" not in given and given.get("type") is None:
            self.inline.append(tag)
        self.inline += [
            f"{tag} {name}"
            for name in given
            if name.startswith("on") or name == "style"
        ]
        if tag == "style":
            self.inline.append(tag)
        if tag == "a":
            self.links.append(str(given.get("href")))
        if tag == "img":
            self.images.append(str(given.get("src")))


def assert_safe(html: str) -> None:
    markup = Markup(html)
    assert markup.inline == []
    assert "<script>alert" not in html
    assert "14&amp;amp;" not in html
    shown = ("data:image/", django_settings.STATIC_URL)
    assert not [image for image in markup.images if not image.startswith(shown)]
    assert not [
        link for link in markup.links if link.lower().startswith(("javascript", "data"))
    ]
