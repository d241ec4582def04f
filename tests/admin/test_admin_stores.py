"""Histories of other stores in Django's admin, and stores that fail."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils.html import escape

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentSession
from tests.servers import Server
from tests.servers.process import free_port
from tests.servers.redis import url as redis_url
from tests.support.admin_pages import LIST, make_run, messages, page, staff, url
from tests.support.exports import read_export

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

REDIS = "agent_sessions.backends.redis.RedisBackend"
DATABASE = "agent_sessions.backends.database.DatabaseBackend"
UNREAD = "The messages can\u2019t be read."
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"


@pytest.fixture
def reader() -> Client:
    return staff("view", "read", "clear", "delete", runs=True)


def make(alias: str, *texts: str) -> AgentSession:
    name = f"chat-{uuid.uuid4()}"
    items = [{"role": "user", "content": text} for text in texts]
    sessions[alias].append(SessionKey(name), items)
    return AgentSession.objects.get(session_id=name)


class TestRedis:
    @pytest.fixture(autouse=True)
    def store(self, redis_server: Server, settings: Any) -> None:
        options = {"url": redis_url(redis_server, 4)}
        settings.AGENT_SESSIONS = {"redis": {"BACKEND": REDIS, "OPTIONS": options}}

    def test_pages_items_and_runs(self, reader: Client) -> None:
        row = make("redis", *(f"m{n}." for n in range(1, 251)))
        make_run(row, run_id="the-run", first_position=201, last_position=210)
        html = page(reader, url("change", row))
        assert ">m250.<" in html
        assert ">m150.<" not in html
        assert "Run the-run" in html
        assert "as-branches" not in html
        html = page(reader, url("change", row) + "?before=151")
        assert ">m51.<" in html
        assert "Run the-run" not in html
        assert 'href="?after=150"' in html
        html = page(reader, url("change", row) + "?after=150&branch=main")
        assert ">m151.<" in html
        assert ">Later<" not in html
        assert "m7." in page(reader, url("item", row, 7))
        run = row.runs.get()
        html = page(
            reader, reverse("admin:agent_sessions_agentrun_change", args=(run.pk,))
        )
        assert ">m201.<" in html
        assert ">m211.<" not in html

    def test_exports(self, reader: Client) -> None:
        row = make("redis", *(f"m{n}." for n in range(450)))
        response: Any = reader.get(url("export", row, "markdown"))
        text = b"".join(response.streaming_content).decode()
        assert [line for line in text.splitlines() if line.startswith("m")] == [
            f"m{n}." for n in range(450)
        ]
        response = reader.get(url("export", row, "json"))
        (found,) = read_export(b"".join(response.streaming_content).decode())
        assert len(found["items"]) == 450

    def test_clear_and_delete(self, reader: Client) -> None:
        row = make("redis", "m1.")
        reader.post(url("clear", row), {"post": "yes", "count": "1"})
        assert sessions["redis"].latest(SessionKey(row.session_id), None) == []
        reader.post(url("delete", row), {"post": "yes"})
        assert not AgentSession.objects.exists()


class TestEncrypted:
    def set(self, settings: Any, key: str) -> None:
        settings.AGENT_SESSIONS = {
            "default": {"BACKEND": DATABASE},
            "private": {
                "BACKEND": ENCRYPTED,
                "OPTIONS": {"backend": "default", "keys": [key]},
            },
        }

    def test_with_the_key_readers_read(self, reader: Client, settings: Any) -> None:
        self.set(settings, "a" * 40)
        row = make("private", "The secret.")
        assert ">The secret.<" in page(reader, url("change", row))
        other = staff("view", "clear", "delete", name="other")
        assert "The secret." not in page(other, url("change", row))

    def test_with_a_wrong_key_items_are_shown_as_encrypted(
        self, reader: Client, settings: Any
    ) -> None:
        self.set(settings, "a" * 40)
        row = make("private", "The secret.")
        self.set(settings, "b" * 40)
        html = page(reader, url("change", row))
        assert "The secret." not in html
        assert "as-entry as-encrypted" in html


class TestFailing:
    @pytest.fixture
    def row(self, settings: Any) -> AgentSession:
        """A session of a store that nothing answers for."""
        options = {
            "url": f"redis://127.0.0.1:{free_port()}/0",
            "client_options": {"socket_connect_timeout": 1},
        }
        settings.AGENT_SESSIONS = {"redis": {"BACKEND": REDIS, "OPTIONS": options}}
        return AgentSession.objects.create(session_id="chat", backend="redis")

    def test_the_page_says_so(self, reader: Client, row: AgentSession) -> None:
        html = page(reader, url("change", row))
        assert UNREAD in html
        assert 'id="as-session-id">chat<' in html
        assert "1 agent session" in page(reader, reverse(LIST))

    def test_so_does_a_run(self, reader: Client, row: AgentSession) -> None:
        run = make_run(row, first_position=1, last_position=2)
        html = page(
            reader, reverse("admin:agent_sessions_agentrun_change", args=(run.pk,))
        )
        assert UNREAD in html

    def test_an_item_is_not_found(self, reader: Client, row: AgentSession) -> None:
        assert reader.get(url("item", row, 1)).status_code == 404

    @pytest.mark.parametrize("form", ["json", "markdown"])
    def test_an_export_is_refused(
        self, reader: Client, row: AgentSession, form: str
    ) -> None:
        response = reader.get(url("export", row, form), follow=True)
        assert response.redirect_chain == [(url("change", row), 302)]
        (told,) = messages(response)
        assert told.startswith("chat was not exported: ")

    @pytest.mark.parametrize("deed", ["clear", "delete"])
    def test_nothing_is_done_by_half(
        self, reader: Client, row: AgentSession, deed: str
    ) -> None:
        data = {"post": "yes", "count": "1"}
        response = reader.post(url(deed, row), data, follow=True)
        (told,) = messages(response)
        assert told.startswith("chat was left as it is: ")
        assert AgentSession.objects.filter(pk=row.pk).exists()


def test_a_store_whose_extra_is_missing_is_told(reader: Client, settings: Any) -> None:
    settings.AGENT_SESSIONS = {"x": {"BACKEND": "nowhere.Backend"}}
    row = AgentSession.objects.create(session_id="chat", backend="x")
    html = page(reader, url("change", row))
    assert UNREAD in html
    assert escape("nowhere.Backend") in html
