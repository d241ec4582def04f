"""One conversation in Django's admin."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agent_sessions.models import AgentSession, SessionItem
from tests.support.admin_pages import (
    LIST,
    XSS,
    Markup,
    assert_safe,
    make,
    page,
    staff,
    url,
)
from tests.transcript.test_transcript import KINDS

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


@pytest.fixture
def reader() -> Client:
    return staff("view", "read")


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


class TestTranscript:
    def test_header_and_messages(self, reader: Client, alice: Any) -> None:
        row = make("chat", user=alice, agent_name="Support", input_tokens=1234)
        html = page(reader, url("change", row))
        assert '<code class="as-id" id="as-session-id">chat</code>' in html
        for text in (
            "Support",
            "alice",
            "1,234",
            "First line of chat",
            "An answer",
            "idle",
        ):
            assert text in html
        markup = Markup(html)
        assert len(markup.ids) == len(set(markup.ids))
        assert {"item-1", "item-2"} <= set(markup.ids)
        assert "agent_sessions/admin.css" in html
        assert "agent_sessions/admin.js" in html
        assert 'name="_save"' not in html

    def test_the_owner_is_a_link_for_those_who_may_see_users(self, alice: Any) -> None:
        row = make(user=alice)
        address = reverse("admin:auth_user_change", args=(alice.pk,))
        client = staff("view", "read")
        assert address not in page(client, url("change", row))
        user = get_user_model().objects.get(username="staff")
        user.user_permissions.add(Permission.objects.get(codename="view_user"))
        assert address in page(client, url("change", row))

    def test_calls_and_outputs_are_one_entry(self, reader: Client) -> None:
        row = make(
            "chat",
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "weather",
                "arguments": '{"city":"Rome"}',
            },
            {"type": "function_call_output", "call_id": "c1", "output": "Sunny"},
            {
                "type": "function_call",
                "call_id": "c2",
                "name": "transfer_to_billing",
                "arguments": "{}",
            },
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": '{"assistant": "Billing"}',
            },
        )
        html = page(reader, url("change", row))
        assert html.count('class="as-entry as-call"') == 2
        assert "Sunny" in html
        assert "&quot;city&quot;: &quot;Rome&quot;" in html
        assert "Handoff to Billing" in html
        assert {"item-1", "item-2", "item-3", "item-4"} <= set(Markup(html).ids)

    def test_every_kind_is_shown(self, reader: Client) -> None:
        items = [{"type": name, **item} for name, (item, _) in KINDS.items()]
        row = make(
            "chat",
            *items,
            {"type": "telepathy"},
            {"__enc__": 1, "kid": "k", "payload": "x"},
        )
        html = page(reader, url("change", row))
        assert "Unknown item type telepathy" in html
        assert "Encrypted, 1 characters" in html
        assert "History compacted here" in html
        assert_safe(html)

    def test_unreadable_rows_stand_in_their_places(self, reader: Client) -> None:
        row = make()
        SessionItem.objects.filter(position=1).update(data='{"broken": <b>')
        html = page(reader, url("change", row))
        assert "Unreadable" in html
        assert "{&quot;broken&quot;: &lt;b&gt;" in html
        assert "Expecting value at character 11" in html
        assert "An answer" in html

    def test_pages_by_position(self, reader: Client) -> None:
        row = make(
            "chat",
            *({"role": "user", "content": f"message {n}."} for n in range(1, 251)),
        )
        html = page(reader, url("change", row))
        assert "message 250." in html
        assert "message 151." in html
        assert "message 150." not in html
        assert 'href="?before=151"' in html
        assert ">Newest<" not in html
        html = page(
            reader, url("change", row) + "?before=151&_changelist_filters=q%3Da"
        )
        assert "message 150." in html
        assert "message 51." in html
        assert "message 151." not in html
        assert 'href="?_changelist_filters=q%3Da&amp;before=51"' in html
        assert 'href="?_changelist_filters=q%3Da"' in html
        assert 'href="?_changelist_filters=q%3Da&amp;after=150"' in html
        html = page(reader, url("change", row) + "?before=51")
        assert "message 1." in html
        assert ">Earlier<" not in html
        html = page(reader, url("change", row) + "?after=50")
        assert "message 51." in html
        assert "message 150." in html
        assert "message 50." not in html
        assert "message 151." not in html
        assert 'href="?before=51"' in html
        assert 'href="?after=150"' in html
        html = page(reader, url("change", row) + "?after=150")
        assert ">Later<" not in html
        assert 'href="?before=151"' in html
        html = page(reader, url("change", row) + "?after=250")
        assert "There is nothing in this place." in html
        assert ">Newest<" in html

    def test_an_output_leads_to_its_call_on_another_page(self, reader: Client) -> None:
        def call(call_id: str) -> dict[str, str]:
            return {
                "type": "function_call",
                "call_id": call_id,
                "name": "look_up",
                "arguments": "{}",
            }

        def output(call_id: str) -> dict[str, str]:
            return {
                "type": "function_call_output",
                "call_id": call_id,
                "output": "1",
            }

        row = make(
            "chat",
            call("far"),
            *({"role": "user", "content": "x"} for _ in range(1_000)),
            call("near"),
            output("near"),
            *({"role": "user", "content": "x"} for _ in range(97)),
            output("far"),
            output("gone"),
        )
        html = page(reader, url("change", row))
        assert html.count(">Its call</a>") == 1
        link = "?after=1001#item-1002"
        assert f'<a href="{link}">Its call</a>' in html
        html = page(reader, url("change", row) + link)
        assert 'id="item-1002"' in html
        assert ">Its call</a>" not in html

    def test_a_page_carries_so_much_text(self, reader: Client) -> None:
        texts = ("x" * 9_999 for _ in range(120))
        row = make("chat", *({"role": "user", "content": text} for text in texts))
        SessionItem.objects.update(
            data=json.dumps(
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "x" * 9_999}] * 3,
                }
            )
        )
        html = page(reader, url("change", row))
        assert len(html) < 1_500_000
        assert html.count("Show raw (9999 characters)") == 200

    def test_a_very_long_item_is_a_download(self, reader: Client) -> None:
        row = make("chat", {"role": "user", "content": "x" * 2_100_000})
        response = reader.get(url("item", row, 1))
        assert response["Content-Disposition"] == 'attachment; filename="1.json"'
        short = make("short")
        assert "Content-Disposition" not in reader.get(url("item", short, 1))

    @pytest.mark.parametrize("before", ["x", "-1", "1.5", "9" * 30, "٣", ""])
    def test_a_broken_link_shows_the_newest(self, reader: Client, before: str) -> None:
        html = page(reader, url("change", make()) + f"?before={before}")
        assert "An answer" in html

    @pytest.mark.parametrize("before", [0, 1, 10**18])
    def test_any_position_is_a_page(self, reader: Client, before: int) -> None:
        html = page(reader, url("change", make()) + f"?before={before}")
        assert ("An answer" in html) is (before > 2)

    def test_queries_are_the_same_for_one_item_and_a_thousand(
        self, reader: Client
    ) -> None:
        short = make("short", {"role": "user", "content": "Hi"})
        long = make(
            "long", *({"role": "user", "content": str(n)} for n in range(1_000))
        )
        reader.get(url("change", short))
        counts = []
        for row in (short, long):
            with CaptureQueriesContext(connection) as queries:
                reader.get(url("change", row))
            counts.append(len(queries))
        assert counts[0] == counts[1] <= 12

    def test_a_session_without_items(self, reader: Client) -> None:
        row = AgentSession.objects.create(session_id="new")
        assert "This session has no messages" in page(reader, url("change", row))

    def test_a_store_that_is_not_configured_is_told(self, reader: Client) -> None:
        row = AgentSession.objects.create(session_id="old", backend="gone")
        html = page(reader, url("change", row))
        assert "AGENT_SESSIONS has no alias &#x27;gone&#x27;" in html

    def test_raw_items(self, reader: Client) -> None:
        row = make("chat", {"role": "user", "content": "<b>é\x00"})
        response = reader.get(url("item", row, 1))
        assert response.status_code == 200
        assert response["Content-Type"] == "text/plain; charset=utf-8"
        assert response["X-Content-Type-Options"] == "nosniff"
        assert response["Content-Security-Policy"] == "sandbox"
        assert json.loads(response.content) == {"role": "user", "content": "<b>é\x00"}
        for position in (0, 2, 10**18):
            assert reader.get(url("item", row, position)).status_code == 404

    def test_raw_items_of_no_session_or_store(self, reader: Client) -> None:
        row = AgentSession.objects.create(session_id="old", backend="gone")
        assert reader.get(url("item", row, 1)).status_code == 404
        row.pk = 12345
        assert reader.get(url("item", row, 1)).status_code == 404

    def test_gaps_of_silence(self, reader: Client) -> None:
        row = make()
        SessionItem.objects.filter(position=1).update(
            created_at=timezone.now() - timedelta(hours=2, seconds=90)
        )
        html = page(reader, url("change", row)).replace("\xa0", " ")
        assert re.search(r"2 hours, 1 minute later", html)


class TestHostileContents:
    def test_in_every_field_of_the_list_and_header(self, alice: Any) -> None:
        get_user_model().objects.filter(pk=alice.pk).update(username=XSS)
        alice.refresh_from_db()
        fields = {"title": XSS, "agent_name": XSS, "state": "<b>", "run_id": XSS[:64]}
        row = make(XSS, user=alice, **fields)
        client = staff("view", "read", "clear", "delete")
        for address in (
            reverse(LIST),
            url("change", row),
            url("clear", row),
            url("delete", row),
            url("history", row),
        ):
            html = page(client, address)
            assert_safe(html)
            assert "&lt;script&gt;alert(1)" in html

    def test_in_every_field_of_every_kind(self, reader: Client) -> None:
        address = "javascript:alert(3)"
        items = [
            _replaced({"type": name, "id": "x", **item}, text)
            for name, (item, _) in KINDS.items()
            for text in (XSS, address)
        ]
        items += [
            {"role": XSS, "content": XSS},
            {"role": "assistant", "content": [{"type": XSS, "text": XSS}]},
            {
                "role": "assistant",
                "content": [
                    {
                        "type": "output_text",
                        "text": XSS,
                        "annotations": [
                            {"type": "url_citation", "url": address, "title": XSS},
                            {
                                "type": "url_citation",
                                "url": f"https://a/{XSS}",
                                "title": XSS,
                            },
                            {"type": "file_citation", "file_id": XSS, "filename": XSS},
                        ],
                    },
                    {"type": "refusal", "refusal": XSS},
                    {"type": "input_image", "image_url": address},
                    {
                        "type": "input_image",
                        "image_url": f"data:image/png;base64,{XSS}",
                    },
                    {"type": "input_file", "file_url": address, "filename": XSS},
                    {
                        "type": "input_audio",
                        "input_audio": {"data": XSS, "format": XSS},
                    },
                ],
            },
            {"type": XSS, "x": XSS},
            {"__enc__": 1, "kid": XSS, "payload": XSS},
        ]
        row = make("chat", *items)
        SessionItem.objects.filter(position=1).update(data=XSS)
        html = page(reader, url("change", row))
        assert html.count("&lt;script&gt;alert(1)") > 30
        assert_safe(html)

    def test_templates_hold_no_script_and_no_style(self) -> None:
        row = make()
        client = staff("view", "read", "clear", "delete")
        for address in (reverse(LIST), url("change", row), url("clear", row)):
            assert Markup(page(client, address)).inline == []


def _replaced(value: Any, text: str) -> Any:
    """Put a text in the place of every string but the types."""
    if isinstance(value, dict):
        return {k: v if k == "type" else _replaced(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, text) for entry in value]
    return text if isinstance(value, str) else value
