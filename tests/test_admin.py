"""The conversations in Django's admin."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.admin import AdminSite, site
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse
from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.admin import AgentSessionAdmin, CappedPaginator
from agent_sessions.backends.base import SessionKey
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.test_transcript import KINDS

pytestmark = pytest.mark.django_db

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


def staff(*rights: str, name: str = "staff") -> Client:
    user = get_user_model().objects.create_user(name, password="x", is_staff=True)
    user.user_permissions.set(
        Permission.objects.filter(codename__in=[f"{r}_agentsession" for r in rights])
    )
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


@pytest.fixture
def reader() -> Client:
    return staff("view", "read")


@pytest.fixture
def alice() -> Any:
    return get_user_model().objects.create_user("alice", password="x")


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


class TestList:
    def test_columns(self, reader: Client, alice: Any) -> None:
        make("chat", user=alice, input_tokens=12345, output_tokens=678)
        html = page(reader, reverse(LIST))
        assert "First line of chat" in html
        assert "alice" in html
        assert "12,345 / 678" in html
        for header in (
            "Title",
            "User",
            "Store",
            "Items",
            "State",
            "Last activity",
            "Created",
        ):
            assert f">{header}<" in html

    @pytest.mark.parametrize(
        ("state", "words"),
        [("idle", "idle"), ("running", "running"), ("waiting", "waiting for approval")],
    )
    def test_state_is_told_in_words(
        self, reader: Client, state: str, words: str
    ) -> None:
        make(state=state)
        html = page(reader, reverse(LIST))
        assert f'<span class="as-state as-state-{state}">{words}</span>' in html

    def test_sessions_without_title_or_tokens(self, reader: Client) -> None:
        AgentSession.objects.create(session_id="new")
        make("tool", {"type": "reasoning", "id": "r", "summary": []})
        html = page(reader, reverse(LIST))
        assert '<span class="as-quiet">(empty)</span>' in html
        assert '<span class="as-quiet">tool</span>' in html
        assert 'class="field-tokens">-<' in html

    def test_order_is_by_day_and_serves_the_index(self, reader: Client) -> None:
        today = timezone.now().date()
        for days, name in enumerate(("today", "yesterday", "before")):
            make(name, active_on=today - timedelta(days=days))
        html = page(reader, reverse(LIST))
        places = [
            html.index(f"First line of {n}") for n in ("today", "yesterday", "before")
        ]
        assert places == sorted(places)

    @pytest.mark.parametrize(
        ("search", "found"),
        [
            ("cha", {"chat"}),
            ("essage", set()),
            ("alice", {"hers"}),
            ("ali", set()),
            ("line of chat", {"chat"}),
            ("answer", set()),
        ],
    )
    def test_search(
        self, reader: Client, alice: Any, search: str, found: set[str]
    ) -> None:
        make("chat")
        make("hers", user=alice)
        html = page(reader, f"{reverse(LIST)}?q={search}")
        assert {n for n in ("chat", "hers") if f"First line of {n}" in html} == found
        assert "Message texts are not searched" in html

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("state__exact=waiting", {"waits"}),
            ("user__isempty=1", {"chat", "waits"}),
            ("user__isempty=0", {"hers"}),
            ("backend=other", {"waits"}),
        ],
    )
    def test_filters(
        self, reader: Client, alice: Any, query: str, found: set[str]
    ) -> None:
        names = {
            "default": {"BACKEND": DATABASE_BACKEND},
            "other": {"BACKEND": DATABASE_BACKEND},
        }
        with override_settings(AGENT_SESSIONS=names):
            make("chat")
            make("hers", user=alice)
            make("waits", backend="other", state="waiting")
            html = page(reader, f"{reverse(LIST)}?{query}")
        assert {
            n for n in ("chat", "hers", "waits") if f"First line of {n}" in html
        } == found
        assert "By store" in html

    def test_one_store_is_no_choice(self, reader: Client) -> None:
        make()
        assert "By store" not in page(reader, reverse(LIST))

    def test_queries_are_the_same_for_one_session_and_a_thousand(
        self, reader: Client, alice: Any
    ) -> None:
        make("one", user=alice)
        reader.get(reverse(LIST))
        with CaptureQueriesContext(
            connection,
        ) as few:
            reader.get(reverse(LIST))
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}", user=alice, title=f"t{n}")
            for n in range(1_000)
        )
        with CaptureQueriesContext(connection) as many:
            reader.get(reverse(LIST))
        assert len(few) == len(many)
        table = [q["sql"] for q in many if "agent_sessions_agentsession" in q["sql"]]
        assert len(table) == 2
        (count,) = (sql for sql in table if "COUNT(" in sql.upper())
        assert "LIMIT 10001" in count

    def test_counting_ends_at_its_limit(self, reader: Client, monkeypatch: Any) -> None:
        monkeypatch.setattr(CappedPaginator, "limit", 60)
        rows = [AgentSession(session_id=f"s{n}", title=f"t{n}") for n in range(61)]
        AgentSession.objects.bulk_create(rows[:60])
        assert "There are more" not in page(reader, reverse(LIST))
        AgentSession.objects.bulk_create(rows[60:])
        html = page(reader, reverse(LIST))
        assert "There are more; search or filter" in html
        assert "60 agent sessions" in html
        assert "?p=2" in html
        assert "?p=3" not in html


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
        html = page(reader, url("change", row) + "?before=51")
        assert "message 1." in html
        assert ">Earlier<" not in html

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


# What each page answers to someone who holds just these rights: list, session, raw
# item, page to clear, page to delete, page to add.
PERMISSIONS: dict[tuple[str, ...], tuple[int, int, int, int, int, int]] = {
    (): (403, 403, 403, 403, 403, 403),
    ("read",): (403, 403, 403, 403, 403, 403),
    ("clear",): (403, 403, 403, 403, 403, 403),
    ("add",): (403, 403, 403, 403, 403, 403),
    ("change",): (403, 403, 403, 403, 403, 403),
    ("delete",): (403, 403, 403, 403, 200, 403),
    ("view",): (200, 200, 403, 403, 403, 403),
    ("view", "read"): (200, 200, 200, 403, 403, 403),
    ("view", "clear"): (200, 200, 403, 200, 403, 403),
    ("view", "delete"): (200, 200, 403, 403, 200, 403),
    ("view", "add", "change"): (200, 200, 403, 403, 403, 403),
    RIGHTS: (200, 200, 200, 200, 200, 403),
}


def addresses(row: AgentSession) -> tuple[str, ...]:
    return (
        reverse(LIST),
        url("change", row),
        url("item", row, 1),
        url("clear", row),
        url("delete", row),
        reverse("admin:agent_sessions_agentsession_add"),
    )


class TestPermissions:
    @pytest.mark.parametrize(("rights", "expected"), PERMISSIONS.items())
    @pytest.mark.parametrize("owned", [False, True])
    def test_pages(
        self,
        rights: tuple[str, ...],
        expected: tuple[int, ...],
        owned: bool,
        alice: Any,
    ) -> None:
        row = make(user=alice if owned else None)
        client = staff(*rights)
        found = tuple(client.get(address).status_code for address in addresses(row))
        assert found == expected

    @pytest.mark.parametrize("rights", PERMISSIONS)
    def test_deeds(self, rights: tuple[str, ...]) -> None:
        row = make()
        client = staff(*rights)
        for deed, right in (("clear_history", "clear"), ("delete_selected", "delete")):
            client.post(
                reverse(LIST),
                {
                    "action": deed,
                    "_selected_action": row.pk,
                    "post": "yes",
                    "count": "1",
                },
            )
            may = {"view", right} <= set(rights)
            rows = AgentSession.objects.filter(item_count=2)
            assert rows.exists() is not may
            AgentSession.objects.all().delete()
            row = make()
        client.post(url("clear", row), {"post": "yes", "count": "1"})
        assert AgentSession.objects.get().item_count == (
            0 if {"view", "clear"} <= set(rights) else 2
        )
        client.post(url("delete", row), {"post": "yes"})
        assert AgentSession.objects.exists() is ("delete" not in rights)

    def test_nobody_changes_anything(self) -> None:
        row = make()
        client = staff(*RIGHTS)
        response = client.post(url("change", row), {"title": "Mine", "_save": "Save"})
        assert response.status_code == 403
        assert AgentSession.objects.get().title == "First line of chat"

    def test_strangers_are_asked_to_log_in(self, alice: Any) -> None:
        row = make(user=alice)
        owner = Client()
        owner.force_login(alice)
        for client in (Client(), owner):
            for address in addresses(row):
                response = client.get(address)
                assert response.status_code == 302
                assert response["Location"].startswith(django_settings.LOGIN_URL)

    def test_without_the_right_to_read_nothing_said_is_shown(self) -> None:
        row = make()
        client = staff("view", "clear", "delete")
        for address in (
            reverse(LIST),
            url("change", row),
            url("clear", row),
            url("delete", row),
            url("history", row),
            f"{reverse(LIST)}?q=chat",
        ):
            html = page(client, address)
            assert "chat" in html
            assert "First line" not in html
            assert "An answer" not in html
        assert "but not read its messages" in page(client, url("change", row))
        assert "0 agent sessions" in page(client, f"{reverse(LIST)}?q=First")

    def test_links_are_shown_to_those_who_may_follow_them(self) -> None:
        row = make()
        assert url("clear", row) not in page(staff("view"), url("change", row))
        client = staff("view", "clear", name="other")
        assert url("clear", row) in page(client, url("change", row))

    def test_a_session_that_is_gone(self) -> None:
        row = make()
        address = url("clear", row)
        row.delete()
        response = staff(*RIGHTS).get(address, follow=True)
        assert "exist" in messages(response)[0]


backoffice = AdminSite(name="backoffice")
backoffice.register(AgentSession, AgentSessionAdmin)
urlpatterns = [
    path("admin/", site.urls),
    path("backoffice/", backoffice.urls),
]


@override_settings(ROOT_URLCONF="tests.test_admin")
def test_another_admin_site_stays_on_itself(alice: Any) -> None:
    row = make(user=alice)
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("root", password="x"))
    address = reverse("backoffice:agent_sessions_agentsession_change", args=(row.pk,))
    for html in (
        page(client, address),
        page(client, f"{address.removesuffix('change/')}clear/"),
        page(client, reverse("backoffice:agent_sessions_agentsession_changelist")),
    ):
        assert not [link for link in Markup(html).links if link.startswith("/admin/")]
    done = client.post(
        f"{address.removesuffix('change/')}clear/", {"post": "yes", "count": "1"}
    )
    assert done["Location"] == address


class TestClear:
    def test_asks_first_and_tells_what_would_go(self, alice: Any) -> None:
        row = make(user=alice)
        client = staff("view", "clear", "read")
        html = page(client, url("clear", row))
        for text in (
            "cannot be undone",
            "Sessions: 1",
            "Items: 2",
            "Owners: 1",
            "First line of chat",
        ):
            assert text in html
        client.post(url("clear", row), {})
        assert AgentSession.objects.get().item_count == 2

    def test_clears_one_and_logs_it(self, alice: Any) -> None:
        row = make(user=alice, input_tokens=7)
        client = staff("view", "clear")
        response = client.post(
            url("clear", row), {"post": "yes", "count": "1"}, follow=True
        )
        assert response.redirect_chain == [(url("change", row), 302)]
        assert messages(response) == ["Cleared 1 session with 2 items."]
        row.refresh_from_db()
        assert (row.item_count, row.title, row.user, row.input_tokens) == (
            0,
            "",
            alice,
            7,
        )
        entry = LogEntry.objects.get()
        assert entry.change_message == "Cleared 2 items."
        assert entry.object_repr == "chat"

    def test_action_asks_and_clears(self) -> None:
        rows = [make(f"s{n}") for n in range(3)]
        client = staff("view", "clear", "read")
        data = {"action": "clear_history", "_selected_action": [r.pk for r in rows[:2]]}
        html = client.post(reverse(LIST), data).content.decode()
        assert "Sessions: 2" in html
        assert_safe(html)
        form = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', html))
        assert (
            form.items()
            >= {
                "action": "clear_history",
                "count": "2",
                "post": "yes",
                "select_across": "0",
            }.items()
        )
        response = client.post(
            reverse(LIST), {**data, "post": "yes", "count": "2"}, follow=True
        )
        assert messages(response) == ["Cleared 2 sessions with 4 items."]
        assert sorted(AgentSession.objects.values_list("item_count", flat=True)) == [
            0,
            0,
            2,
        ]

    def test_action_over_all_pages_sends_one_key(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(1_100)
        )
        first = AgentSession.objects.first()
        assert first is not None
        client = staff("view", "clear")
        data = {
            "action": "clear_history",
            "_selected_action": first.pk,
            "select_across": "1",
        }
        html = client.post(reverse(LIST), data).content.decode()
        assert html.count('name="_selected_action"') == 1
        assert "Sessions: 1100" in html
        assert "and 1080 more" in html
        response = client.post(
            reverse(LIST), {**data, "post": "yes", "count": "1100"}, follow=True
        )
        assert messages(response) == ["Cleared 1100 sessions with 0 items."]

    def test_asks_again_where_there_are_more_by_now(self) -> None:
        row = make("one")
        client = staff("view", "clear")
        data = {
            "action": "clear_history",
            "_selected_action": row.pk,
            "select_across": "1",
            "post": "yes",
            "count": "1",
        }
        make("two")
        assert "Sessions: 2" in client.post(reverse(LIST), data).content.decode()
        assert set(AgentSession.objects.values_list("item_count", flat=True)) == {2}

    def test_leaves_active_runs_and_names_them(self) -> None:
        busy = make("busy", run_id="r", run_seen_at=timezone.now(), state="running")
        dead = make(
            "dead", run_id="r", run_seen_at=timezone.now() - timedelta(minutes=2)
        )
        data = {
            "action": "clear_history",
            "_selected_action": [busy.pk, dead.pk],
            "post": "yes",
            "count": "2",
        }
        response = staff("view", "clear").post(reverse(LIST), data, follow=True)
        assert messages(response) == [
            "Not cleared, because a run is active: busy.",
            "Cleared 1 session with 2 items.",
        ]
        busy.refresh_from_db()
        assert busy.item_count == 2

    def test_a_store_that_fails_is_told(self) -> None:
        row = AgentSession.objects.create(
            session_id="old", backend="gone", item_count=3
        )
        response = staff("view", "clear").post(
            url("clear", row), {"post": "yes", "count": "1"}, follow=True
        )
        (message,) = messages(response)
        assert message.startswith("old was left as it is: AGENT_SESSIONS has no alias")
        assert not LogEntry.objects.exists()

    def test_needs_the_csrf_token(self) -> None:
        row = make()
        staff("view", "clear")
        client = Client(enforce_csrf_checks=True)
        client.force_login(get_user_model().objects.get(username="staff"))
        assert (
            client.post(url("clear", row), {"post": "yes", "count": "1"}).status_code
            == 403
        )


class TestDelete:
    def test_deletes_one_with_all_that_belongs_to_it(self, alice: Any) -> None:
        row = make(user=alice)
        client = staff("view", "delete")
        html = page(client, url("delete", row))
        assert "Items: 2" in html
        response = client.post(url("delete", row), {"post": "yes"}, follow=True)
        assert response.status_code == 200
        for model in (AgentSession, Branch, SessionItem):
            assert not model.objects.exists()
        assert LogEntry.objects.get().object_repr == "chat"

    def test_pages_of_a_long_session_take_few_queries(self) -> None:
        row = make("long", *({"role": "user", "content": str(n)} for n in range(3_000)))
        client = staff("view", "delete")
        html = page(client, url("delete", row))
        assert "Items: 3000" in html
        assert len(html) < 20_000

    def test_action_deletes_and_tells(self) -> None:
        rows = [make(f"s{n}") for n in range(3)]
        client = staff("view", "delete")
        data = {
            "action": "delete_selected",
            "_selected_action": [r.pk for r in rows[:2]],
        }
        html = client.post(reverse(LIST), data).content.decode()
        assert "Items: 4" in html
        assert "First line" not in html
        response = client.post(reverse(LIST), {**data, "post": "yes"}, follow=True)
        assert messages(response) == ["Deleted 2 sessions."]
        assert AgentSession.objects.count() == 1
        assert set(LogEntry.objects.values_list("object_repr", flat=True)) == {
            "s0",
            "s1",
        }

    def test_many_are_counted(self) -> None:
        AgentSession.objects.bulk_create(
            AgentSession(session_id=f"s{n}") for n in range(25)
        )
        keys = list(AgentSession.objects.values_list("pk", flat=True))
        data = {"action": "delete_selected", "_selected_action": keys}
        html = staff("view", "delete").post(reverse(LIST), data).content.decode()
        assert "and 5 more" in html

    def test_a_store_that_fails_leaves_its_row(self) -> None:
        gone = AgentSession.objects.create(session_id="old", backend="gone")
        row = make()
        client = staff("view", "delete")
        data = {
            "action": "delete_selected",
            "_selected_action": [gone.pk, row.pk],
            "post": "yes",
        }
        told = messages(client.post(reverse(LIST), data, follow=True))
        assert told[0].startswith("old was left as it is: AGENT_SESSIONS has no alias")
        assert told[1:] == ["Deleted 1 session."]
        again = {**data, "_selected_action": [gone.pk]}
        response = client.post(reverse(LIST), again, follow=True)
        assert len(messages(response)) == 1
        response = client.post(url("delete", gone), {"post": "yes"}, follow=True)
        assert messages(response)[0].startswith("old was left as it is")
        assert list(AgentSession.objects.values_list("session_id", flat=True)) == [
            "old"
        ]
        assert LogEntry.objects.count() == 1

    def test_hooks_of_the_model_admin_clear_too(self, rf: Any) -> None:
        admin = site.get_model_admin(AgentSession)
        make("one")
        make("two")
        admin.delete_queryset(rf.get("/"), AgentSession.objects.all())
        assert not SessionItem.objects.exists()
