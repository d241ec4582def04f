"""Exports from Django's admin, and the log of who read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.test import AsyncClient, Client
from django.urls import reverse

from agent_sessions.models import AgentSession
from agent_sessions.transfer.export import FORMAT
from tests.support.admin_pages import LIST, XSS, make, messages, page, staff, url
from tests.support.exports import read_export

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

FORMS = ("json", "markdown")


@pytest.fixture
def reader() -> Client:
    return staff("view", "read")


def body(response: Any) -> str:
    assert response.streaming
    return b"".join(response.streaming_content).decode()


def export(client: Client, form: str, *rows: AgentSession, **more: str) -> Any:
    keys = [row.pk for row in rows]
    data = {"action": f"export_{form}", "_selected_action": keys, **more}
    return client.post(reverse(LIST), data)


def logged() -> list[tuple[str, str]]:
    return list(
        LogEntry.objects.order_by("pk").values_list("object_repr", "change_message")
    )


class TestOne:
    def test_json(self, reader: Client) -> None:
        row = make("chat/1 é")
        response = reader.get(url("export", row, "json"))
        assert response["Content-Disposition"] == (
            'attachment; filename="chat-1.jsonl"'
        )
        assert response["Content-Type"] == "application/jsonl"
        assert "no-store" in response["Cache-Control"]
        (found,) = read_export(body(response))
        assert found["format"] == FORMAT
        assert found["session"]["id"] == "chat/1 é"
        assert [item["item"]["role"] for item in found["items"]] == [
            "user",
            "assistant",
        ]
        assert logged() == [("chat/1 é", "Exported as json.")]

    def test_markdown(self, reader: Client) -> None:
        user = get_user_model().objects.create_user("alice")
        row = make("chat", user=user)
        response = reader.get(url("export", row, "markdown"))
        assert response["Content-Disposition"] == 'attachment; filename="chat.md"'
        text = body(response)
        assert text.startswith("# `chat`\n")
        assert "- Owner: `alice`" in text
        assert "First line of chat" in text
        assert logged() == [("chat", "Exported as markdown.")]

    def test_a_long_history_is_whole_and_in_order(self, reader: Client) -> None:
        row = make("chat", *({"role": "user", "content": f"m{n}."} for n in range(900)))
        text = body(reader.get(url("export", row, "markdown")))
        found = [line for line in text.splitlines() if line.startswith("m")]
        assert found == [f"m{n}." for n in range(900)]

    def test_a_history_without_items(self, reader: Client) -> None:
        row = AgentSession.objects.create(session_id="new")
        assert body(reader.get(url("export", row, "markdown"))).startswith("# `new`")
        assert (
            read_export(body(reader.get(url("export", row, "json"))))[0]["items"] == []
        )

    @pytest.mark.parametrize("form", FORMS)
    def test_a_store_that_fails_is_told_before_anything_is_sent(
        self, reader: Client, form: str
    ) -> None:
        row = AgentSession.objects.create(session_id="old", backend="gone")
        response = reader.get(url("export", row, form), follow=True)
        assert response.redirect_chain == [(url("change", row), 302)]
        (message,) = messages(response)
        assert message.startswith("old was not exported: AGENT_SESSIONS has no alias")
        assert logged() == []

    def test_unknown_forms_and_sessions(self, reader: Client) -> None:
        row = make()
        assert reader.get(url("export", row, "csv")).status_code == 404
        row.pk = 12345
        response = reader.get(url("export", row, "json"), follow=True)
        assert "exist" in messages(response)[0]

    @pytest.mark.parametrize("form", FORMS)
    def test_links_are_for_those_who_may_read(self, form: str) -> None:
        row = make()
        assert url("export", row, form) in page(
            staff("view", "read"), url("change", row)
        )
        other = staff("view", "clear", "delete", name="other")
        assert url("export", row, form) not in page(other, url("change", row))
        assert other.get(url("export", row, form)).status_code == 403
        assert logged() != []
        assert "Exported" not in str(logged())

    def test_file_names_hold_nothing_strange(self, reader: Client) -> None:
        for name, expected in (
            ('a"; filename="b.exe\r\nX: y', "a-filename-b.exe-X-y.md"),
            (XSS, None),
            ("é", "agent-sessions.md"),
            ("../../etc/passwd", "etc-passwd.md"),
        ):
            response = reader.get(url("export", make(name), "markdown"))
            header = response["Content-Disposition"]
            assert header.isascii()
            assert header.count('"') == 2
            assert expected is None or header.endswith(f'"{expected}"')
            body(response)


class TestAction:
    def test_json_has_each_session(self, reader: Client) -> None:
        rows = [make(f"s{n}") for n in range(3)]
        response = export(reader, "json", *rows[:2])
        assert response["Content-Disposition"].endswith('"agent-sessions.jsonl"')
        found = read_export(body(response))
        assert {one["session"]["id"] for one in found} == {"s0", "s1"}
        assert {name for name, _text in logged()} == {"s0", "s1"}

    def test_markdown_has_a_heading_a_session(self, reader: Client) -> None:
        rows = [make(f"s{n}") for n in range(2)]
        text = body(export(reader, "markdown", *rows))
        assert [line for line in text.splitlines() if line.startswith("# ")] == [
            "# `s1`",
            "# `s0`",
        ]

    def test_what_fails_is_named_and_the_rest_is_sent(self, reader: Client) -> None:
        gone = AgentSession.objects.create(session_id="old", backend="gone")
        response = export(reader, "json", gone, make())
        assert read_export(body(response))[0]["session"]["id"] == "chat"
        assert [name for name, _text in logged()] == ["chat"]
        told = messages(reader.get(reverse(LIST)))
        assert len(told) == 1
        assert told[0].startswith("old was not exported")

    def test_more_than_a_hundred_are_refused(self, reader: Client) -> None:
        rows = AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(101)
        )
        response = export(reader, "json", rows[0], select_across="1")
        assert response.status_code == 302
        told = messages(reader.get(reverse(LIST)))
        assert told == ["At most 100 sessions can be chosen for this. Filter the list."]
        assert logged() == []
        rows[0].delete()
        response = export(reader, "json", rows[1], select_across="1")
        assert len(read_export(body(response))) == 100

    @pytest.mark.parametrize("form", FORMS)
    def test_needs_the_right_to_read(self, form: str) -> None:
        row = make()
        response = export(staff("view", "clear", "delete"), form, row)
        assert not response.streaming
        assert logged() == []


async def test_under_asgi_the_file_is_sent_in_steps() -> None:
    def prepare() -> tuple[AgentSession, Any]:
        row = make(
            "chat", *({"role": "user", "content": "x" * 9_000} for _ in range(30))
        )
        return row, get_user_model().objects.create_superuser("root", password="x")

    row, root = await sync_to_async(prepare)()
    client = AsyncClient()
    await client.aforce_login(root)
    response: Any = await client.get(url("export", row, "markdown"))
    chunks = [chunk async for chunk in _async(response)]
    assert len(chunks) > 2
    text = b"".join(chunks).decode()
    assert text.count("x" * 9_000) == 30


async def _async(response: Any) -> AsyncIterator[bytes]:
    assert response.is_async
    async for chunk in response.streaming_content:
        yield chunk


class TestLog:
    def test_reading_is_logged_with_what_was_read(self, reader: Client) -> None:
        row = make("chat", *({"role": "user", "content": f"m{n}."} for n in range(150)))
        page(reader, url("change", row))
        page(reader, url("change", row) + "?before=51")
        page(reader, url("item", row, 7))
        assert logged() == [
            ("chat", "Read items 51 to 150."),
            ("chat", "Read items 1 to 50."),
            ("chat", "Read item 7."),
        ]
        history = page(reader, url("history", row))
        assert "Read items 51 to 150." in history
        assert "staff" in history

    def test_what_was_not_read_is_not_logged(self) -> None:
        row = make()
        client = staff("view", "clear", "delete")
        page(client, url("change", row))
        page(client, reverse(LIST))
        assert client.get(url("item", row, 1)).status_code == 403
        reader = staff("view", "read", name="reader")
        assert reader.get(url("item", row, 99)).status_code == 404
        page(reader, url("change", AgentSession.objects.create(session_id="new")))
        assert logged() == []
