"""Reloads, several tabs, and servers that die."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, WebSocketRoute, expect

from example_project.demo_answers import STORY
from tests.browser.chat import Chat, log_in
from tests.browser.conftest import USERS
from tests.browser.demo import Demo

WHOLE_STORY = [block.strip() for block in STORY.split("\n\n")]


def expect_the_whole_story(chat: Chat) -> None:
    """Expect every word of it, once and in order."""
    # Words of a run that was killed stand there, and are not busy, until the next begins.
    story = chat.answer.locator(".body > p")
    expect(story).to_have_text(WHOLE_STORY, timeout=40_000)
    expect(chat.answer).to_have_attribute("aria-busy", "false", timeout=20_000)


@pytest.fixture(scope="module")
def mortal_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("mortal"))
    demo.start()
    demo.make_users(*USERS)
    yield demo
    demo.end()


@pytest.fixture
def mortal(mortal_demo: Demo) -> Demo:
    """A demo that the test may kill: alive again for the next one."""
    if not mortal_demo.alive:
        mortal_demo.start()
    return mortal_demo


@pytest.fixture
def mortal_chat(
    mortal: Demo, user: str, new_context: Callable[..., BrowserContext]
) -> Chat:
    context = new_context()
    log_in(mortal, context, user)
    return Chat(mortal, context.new_page()).open()


def test_a_reload_in_mid_answer_loses_nothing(chat: Chat) -> None:
    chat.begin_story()
    chat.page.reload()
    expect(chat.page.locator(".user")).to_have_count(1)
    expect(chat.answer).to_have_attribute("aria-busy", "true")
    expect(chat.status).to_have_text("Support is answering…")
    expect_the_whole_story(chat)
    expect(chat.answers).to_have_count(1)


def test_a_broken_connection_goes_on_where_it_broke(chat: Chat) -> None:
    routes: list[WebSocketRoute] = []

    def pass_on(route: WebSocketRoute) -> None:
        route.connect_to_server()
        routes.append(route)

    chat.page.route_web_socket("**/ws/**", pass_on)
    chat.page.reload()
    chat.ask("Hello")
    chat.begin_story()
    routes[-1].close(code=4503)
    expect(chat.page.locator("#banner-text")).to_contain_text("The server restarts")
    chat.page.get_by_role("button", name="Connect now").click()
    expect(chat.page.locator("#banner")).to_be_hidden()
    assert len(routes) == 2
    expect_the_whole_story(chat)
    expect(chat.answers).to_have_count(2)


def test_a_run_that_ends_each_connection_is_given_up(chat: Chat) -> None:
    sent: list[str | bytes] = []

    def end_at_runs(route: WebSocketRoute) -> None:
        server = route.connect_to_server()

        def hear(message: str | bytes) -> None:
            if '"messages":[{' in str(message):
                sent.append(message)
                route.close(code=4503)
            else:
                server.send(message)

        route.on_message(hear)

    chat.page.route_web_socket(re.compile("/ws/"), end_at_runs)
    chat.page.reload()
    chat.send("Hello")
    error = chat.page.locator(".error")
    expect(error).to_contain_text("didn't answer several times", timeout=40_000)
    assert len(sent) == 4
    expect(error.get_by_role("button", name="Retry")).to_be_visible()


def test_what_is_written_without_a_connection_stays(chat: Chat) -> None:
    chat.ask("Hello")
    chat.page.route_web_socket("**/ws/**", lambda route: route.close(code=4503))
    chat.page.reload()
    banner = chat.page.locator("#banner-text")
    expect(banner).to_contain_text("The server restarts")
    chat.send("Are you there?")
    # Over a look at another conversation, and over a reload.
    chat.page.get_by_role("link", name="New conversation").click()
    expect(chat.page.locator(".user")).to_have_count(0)
    expect(chat.box).to_be_empty()
    chat.page.go_back()
    expect(chat.box).to_have_value("Are you there?")
    chat.send("Are you there?")
    chat.page.reload()
    expect(chat.box).to_have_value("Are you there?")


def test_a_message_that_is_refused_stays(chat: Chat) -> None:
    routes: list[WebSocketRoute] = []

    def refuse(route: WebSocketRoute) -> None:
        server = route.connect_to_server()
        routes.append(route)

        def hear(message: str | bytes) -> None:
            frame = json.loads(message)
            if "messages" not in frame or len(routes) > 1:
                server.send(message)
                return
            error = {"type": "RUN_ERROR", "code": "rate_limited", "message": ""}
            chunk = error | {"metadata": {"runId": frame["runId"]}}
            route.send(json.dumps({"id": "refused:1", "chunk": chunk}))

        route.on_message(hear)

    chat.ask("Hello")
    chat.page.route_web_socket("**/ws/**", refuse)
    chat.page.reload()
    expect(chat.answers).to_have_count(1)
    chat.send("What's my name?")
    error = chat.page.locator(".error")
    expect(error).to_contain_text("a lot in a short time")
    # What the server says after a new connection replaces all that is shown.
    chat.page.locator(".user").first.evaluate("element => element.id = 'old'")
    routes[-1].close(code=4503)
    expect(chat.page.locator("#banner")).to_be_visible()
    chat.page.get_by_role("button", name="Connect now").click()
    expect(chat.page.locator("#old")).to_have_count(0)
    expect(chat.page.locator(".user").last).to_contain_text("What's my name?")
    error.get_by_role("button", name="Retry").click()
    expect(chat.answers).to_have_count(2)
    expect(error).to_have_count(0)
    expect(chat.page.locator(".user")).to_have_count(2)


def test_two_tabs_show_the_same(chat: Chat, context: BrowserContext) -> None:
    chat.ask("Hello")
    other = Chat(chat.demo, context.new_page()).open(f"/c/{chat.conversation}/")
    expect(other.answers).to_have_count(1)
    chat.begin_story()
    expect(other.page.locator(".user").last).to_contain_text("Tell me a story")
    expect(other.status).to_have_text("Answering in another tab…")
    late = Chat(chat.demo, context.new_page()).open(f"/c/{chat.conversation}/")
    for tab in (chat, other, late):
        expect_the_whole_story(tab)
        expect(tab.page.locator(".user")).to_have_count(2)
    other.ask("What did I just say?")
    expect(chat.answer).to_contain_text("“Tell me a story”")


def test_either_tab_can_stop(chat: Chat, context: BrowserContext) -> None:
    chat.ask("Hello")
    other = Chat(chat.demo, context.new_page()).open(f"/c/{chat.conversation}/")
    expect(other.answers).to_have_count(1)
    chat.begin_story()
    other.stop.click()
    for tab in (chat, other):
        expect(tab.log.get_by_text("Stopped.")).to_be_visible()


def test_a_killed_server_loses_nothing_acknowledged(
    mortal: Demo, mortal_chat: Chat
) -> None:
    chat = mortal_chat
    chat.ask("My name is Alice")
    chat.begin_story()
    mortal.end(signal.SIGKILL)
    expect(chat.page.locator("#banner-text")).to_contain_text("Connection lost")
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_hidden(timeout=40_000)
    expect(chat.page.locator(".user")).to_contain_text(
        ["My name is Alice", "Tell me a story"]
    )
    expect(chat.page.locator(".user")).to_have_count(2)
    expect(chat.log).to_contain_text("Nice to meet you, Alice!")
    expect(chat.log.get_by_text("stopped in the middle of the answer")).to_be_visible()
    expect(chat.ask("What's my name?")).to_contain_text("Your name is Alice.")


def test_a_server_stopped_by_hand_leaves_nothing_open(
    mortal: Demo, mortal_chat: Chat
) -> None:
    chat = mortal_chat
    chat.begin_story()
    assert mortal.end(signal.SIGINT) == 0
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_hidden(timeout=40_000)
    expect(chat.page.locator("#list .running")).to_have_count(0)
    expect(chat.ask("What did I just say?")).to_contain_text("“Tell me a story”")


def test_retry_after_a_killed_server_asks_once(mortal: Demo, mortal_chat: Chat) -> None:
    chat = mortal_chat
    chat.begin_story()
    mortal.end(signal.SIGKILL)
    mortal.start()
    chat.page.get_by_role("button", name="Retry").click(timeout=40_000)
    expect_the_whole_story(chat)
    chat.page.reload()
    expect(chat.answers).to_have_count(1)
    expect(chat.page.locator(".user")).to_have_count(1)


def test_a_page_reconnects_by_itself(mortal: Demo, mortal_chat: Chat) -> None:
    chat = mortal_chat
    chat.ask("My name is Alice")
    mortal.end(signal.SIGTERM)
    expect(chat.page.locator("#banner")).to_be_visible()
    mortal.start()
    expect(chat.page.locator("#banner")).to_be_hidden(timeout=40_000)
    expect(chat.ask("What's my name?")).to_contain_text("Alice")


def test_a_message_sent_while_the_server_is_away_arrives(
    mortal: Demo, mortal_chat: Chat
) -> None:
    chat = mortal_chat
    chat.ask("My name is Alice")
    mortal.end(signal.SIGKILL)
    expect(chat.page.locator("#banner")).to_be_visible()
    chat.send("What's my name?")
    mortal.start()
    expect(chat.answer).to_contain_text("Your name is Alice.", timeout=40_000)
    expect(chat.page.locator(".user")).to_have_count(2)


def test_a_model_that_is_away_can_be_retried(
    tmp_path: Path, new_context: Callable[..., BrowserContext]
) -> None:
    demo = Demo(tmp_path, OPENAI_API_KEY="key", OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    demo.start()
    demo.make_users("alice")
    try:
        context = new_context()
        log_in(demo, context, "alice")
        chat = Chat(demo, context.new_page()).open()
        expect(chat.page.locator(".model")).to_contain_text("127.0.0.1")
        chat.send("Hello")
        error = chat.page.locator(".error")
        expect(error).to_contain_text("The model couldn't be reached", timeout=20_000)
        error.get_by_role("button", name="Retry").click()
        expect(error).to_have_count(0)
        expect(error).to_have_count(1, timeout=20_000)
        expect(chat.page.locator(".user")).to_have_count(1)
        chat.page.reload()
        expect(error).to_have_count(1)
        expect(chat.page.locator(".user")).to_have_count(1)
    finally:
        demo.end()
