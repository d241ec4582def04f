"""Sending, streaming, stopping; tools, colleagues and memory."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Route, expect

from tests.browser.chat import Chat


def test_an_answer_streams_into_the_page(chat: Chat) -> None:
    chat.begin_story()
    some = chat.answer.inner_text()
    expect(chat.status).to_have_text("Support is answering…")
    expect(chat.answer).to_contain_text("One day a gardener came by")
    assert len(chat.answer.inner_text()) > len(some)
    expect(chat.answer).to_have_attribute("aria-busy", "false", timeout=20_000)
    expect(chat.answer).to_contain_text("they are talking still.")
    expect(chat.status).to_have_text("Answer complete.")
    expect(chat.page.locator(".usage")).to_have_text(
        re.compile(r"\d+ tokens read, \d+ written")
    )
    expect(chat.box).to_be_focused()


@pytest.mark.parametrize("way", ["Enter", "Send"])
def test_what_is_entered_before_the_page_is_ready_is_sent(chat: Chat, way: str) -> None:
    """A slow network brings the page before its modules."""
    chat.ask("My name is Alice")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    chat.page.route("**/chat/chat*.js", hold)
    chat.page.goto(chat.page.url, wait_until="commit")
    chat.box.fill("What's my name?")
    if way == "Enter":
        chat.box.press("Enter")
    else:
        chat.page.get_by_role("button", name="Send").click()
    expect(chat.box).to_have_value("What's my name?")
    [route] = held
    route.continue_()
    expect(chat.answer).to_contain_text("Your name is Alice.", timeout=20_000)
    expect(chat.page.locator(".user")).to_have_count(2)
    expect(chat.box).to_have_value("")


def test_the_agent_remembers(chat: Chat) -> None:
    chat.ask("My name is Alice")
    expect(chat.ask("What's my name?")).to_contain_text("Your name is Alice.")
    chat.page.reload()
    expect(chat.answers).to_have_count(2)
    expect(chat.ask("What did I ask first?")).to_contain_text("“My name is Alice”")


def test_the_model_is_named(chat: Chat) -> None:
    expect(chat.page.get_by_text("Demo model (offline)")).to_be_visible()


def test_a_starter_prompt_is_sent_by_a_click(chat: Chat) -> None:
    chat.page.get_by_role("button", name="What's the weather").click()
    expect(chat.page.locator(".usage")).to_have_count(1, timeout=15_000)
    expect(chat.answer).to_contain_text("In Oslo it's")
    expect(chat.page.locator("#empty")).to_be_hidden()
    expect(chat.box).to_be_focused()


def test_a_tool_folds_its_arguments_and_result(chat: Chat) -> None:
    chat.ask("Where is order 41?")
    tool = chat.page.locator(".tool")
    expect(tool.locator("summary")).to_have_text(re.compile("order_status.*done"))
    expect(tool.get_by_text('"order_id": 41')).to_be_hidden()
    tool.locator("summary").click()
    expect(tool.get_by_text('"order_id": 41')).to_be_visible()
    expect(tool.get_by_text('"status": "delivered"')).to_be_visible()


def test_thoughts_are_folded(chat: Chat) -> None:
    chat.begin_story()
    thoughts = chat.page.locator(".reasoning")
    expect(thoughts.get_by_text("long enough to stop")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.get_by_text("long enough to stop")).to_be_visible()


def test_a_colleague_takes_over_and_stays(chat: Chat) -> None:
    chat.ask("I have a question about my invoices")
    expect(chat.log.get_by_text("Billing specialist takes over")).to_be_visible()
    expect(chat.answer).to_contain_text("Your last invoices")
    expect(chat.answer.locator(".author")).to_have_text("Billing specialist")
    chat.ask("Hello")
    expect(chat.answer.locator(".author")).to_have_text("Billing specialist")
    chat.page.reload()
    expect(chat.log.get_by_text("Billing specialist takes over")).to_have_count(1)
    expect(chat.answer.locator(".author")).to_have_text("Billing specialist")
    chat.ask("What's the weather in Rome?")
    expect(chat.log.get_by_text("Support takes over")).to_have_count(1)


def test_the_stop_button_stops(chat: Chat) -> None:
    chat.begin_story()
    chat.stop.click()
    expect(chat.log.get_by_text("Stopped.")).to_be_visible()
    expect(chat.status).to_have_text("Stopped.")
    expect(chat.answer).to_have_attribute("aria-busy", "false")
    said = chat.answer.inner_text()
    expect(chat.box).to_be_focused()
    expect(chat.ask("What did I just say?")).to_contain_text("“Tell me a story”")
    assert chat.answers.nth(-2).inner_text() == said


def test_escape_stops(chat: Chat) -> None:
    chat.begin_story()
    chat.box.press("Escape")
    expect(chat.log.get_by_text("Stopped.")).to_be_visible()


def test_enter_sends_and_shift_enter_breaks_the_line(chat: Chat) -> None:
    chat.box.press_sequentially("one")
    chat.box.press("Shift+Enter")
    chat.box.press_sequentially("two")
    expect(chat.box).to_have_value("one\ntwo")
    chat.box.press("Enter")
    expect(chat.box).to_have_value("")
    assert chat.page.locator(".user .body").inner_text() == "one\ntwo"


def test_enter_does_nothing_while_an_input_method_composes(chat: Chat) -> None:
    chat.box.fill("にほん")
    chat.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(chat.box).to_have_value("にほん")
    expect(chat.page.locator(".user")).to_have_count(0)


def test_enter_during_an_answer_keeps_what_was_written(chat: Chat) -> None:
    chat.begin_story()
    chat.box.fill("And then?")
    chat.box.press("Enter")
    expect(chat.status).to_have_text("Wait for the answer, or stop it with Esc.")
    expect(chat.box).to_have_value("And then?")


def test_arrow_up_in_an_empty_box_recalls_the_last_prompt(chat: Chat) -> None:
    chat.ask("Hello")
    chat.box.press("ArrowUp")
    expect(chat.box).to_have_value("Hello")


def test_a_text_that_is_too_long_is_refused_and_kept(chat: Chat) -> None:
    for text in ("a" * 32_001, "語" * 31_000):
        chat.box.fill(text)
        chat.box.press("Enter")
        expect(chat.status).to_contain_text("too long")
        expect(chat.box).to_have_value(text)
    chat.box.fill("é" * 20_000)
    chat.box.press("Enter")
    expect(chat.page.locator(".usage")).to_have_count(1, timeout=15_000)


def test_markdown_becomes_elements(chat: Chat) -> None:
    answer = chat.ask("Show me some formatting")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("em")).to_have_text("italic")
    expect(answer.locator("p code")).to_have_text("inline code")
    expect(answer.locator("ol li")).to_have_count(2)
    expect(answer.locator("ul li")).to_have_count(2)
    expect(answer.locator("pre")).to_contain_text("Runner.run(agent")
    link = answer.get_by_role("link", name="link")
    expect(link).to_have_attribute("href", "https://www.djangoproject.com/")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    copied = chat.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("from agent_sessions import get_session\n\nsession")
