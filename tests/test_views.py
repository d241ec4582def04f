"""The JSON beside the websocket: own sessions only, by cursor."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import Client

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession
from agent_sessions.runs.conversation import create_conversation
from agent_sessions.views import SessionListView
from tests.chat import make_user

pytestmark = pytest.mark.django_db


@pytest.fixture
def user() -> Any:
    return make_user()


@pytest.fixture
def browser(user: Any) -> Client:
    client = Client()
    client.force_login(user)
    return client


def read(response: Any) -> Any:
    assert response["Content-Type"] == "application/json"
    return json.loads(response.content)


def test_a_new_conversation_gets_an_id_that_cannot_be_guessed(
    browser: Client, user: Any
) -> None:
    response = browser.post("/agents/sessions/")
    assert response.status_code == 201
    session_id = read(response)["id"]
    assert len(session_id) == 36
    assert AgentSession.objects.for_user(user).get().session_id == session_id


def test_a_forged_post_makes_nothing(user: Any) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    assert client.post("/agents/sessions/").status_code == 403
    assert not AgentSession.objects.exists()


def test_own_conversations_are_listed_newest_first(browser: Client, user: Any) -> None:
    first, second = create_conversation(user), create_conversation(user)
    create_conversation(make_user())
    DjangoSession(first.session_id, user=user).sync.add_items(
        [{"role": "user", "content": "My title\nand more"}]
    )
    listed = read(browser.get("/agents/sessions/"))
    assert listed["next"] is None
    assert [entry["id"] for entry in listed["sessions"]] == [
        first.session_id,
        second.session_id,
    ]
    entry = listed["sessions"][0]
    assert (entry["title"], entry["state"]) == ("My title", "idle")
    assert entry["updatedAt"].startswith("20")


def test_the_list_goes_on_at_its_cursor(
    browser: Client, user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SessionListView, "page_size", 2)
    wanted = [create_conversation(user).session_id for _ in range(5)][::-1]
    found: list[str] = []
    query: dict[str, str] = {}
    while True:
        page = read(browser.get("/agents/sessions/", query))
        found += [entry["id"] for entry in page["sessions"]]
        if page["next"] is None:
            break
        query = {"after": page["next"]}
    assert found == wanted
    assert browser.get("/agents/sessions/", {"after": "x"}).status_code == 400


def test_messages_are_read_page_by_page(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    DjangoSession(row.session_id, user=user).sync.add_items(
        [{"role": "user", "content": f"m{number}"} for number in range(150)]
    )
    url = f"/agents/sessions/{row.session_id}/messages/"
    newest = read(browser.get(url))
    assert [m["content"] for m in newest["messages"][:1]] == ["m50"]
    earlier = read(browser.get(url, {"before": newest["before"]}))
    assert [m["content"] for m in earlier["messages"]] == [f"m{n}" for n in range(50)]
    assert earlier["before"] is None
    assert browser.get(url, {"before": "-1"}).status_code == 400


def test_deleting_takes_the_whole_conversation(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    url = f"/agents/sessions/{row.session_id}/"
    AgentSession.objects.filter(pk=row.pk).update(state="running")
    assert browser.delete(url).status_code == 409
    AgentSession.objects.filter(pk=row.pk).update(state="idle")
    assert browser.delete(url).status_code == 204
    assert not AgentSession.objects.exists()
    assert browser.delete(url).status_code == 404


@pytest.mark.parametrize("session_id", ["theirs", "unknown", "x" * 300])
def test_what_is_not_yours_does_not_exist(browser: Client, session_id: str) -> None:
    if session_id == "theirs":
        session_id = create_conversation(make_user()).session_id
    for method, path in (("get", "messages/"), ("delete", "")):
        answer = getattr(browser, method)(f"/agents/sessions/{session_id}/{path}")
        assert (answer.status_code, read(answer)) == (404, {"error": "not_found"})


def test_nobody_without_a_login_and_nothing_kept_by_caches(browser: Client) -> None:
    assert Client().get("/agents/sessions/").status_code == 401
    assert Client().post("/agents/sessions/").status_code == 401
    response = browser.get("/agents/sessions/")
    assert response["Cache-Control"] == "private, no-store"
