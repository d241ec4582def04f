"""Edit a message, answer again, and step through the versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, expect

from tests.browser.chat import Chat
from tests.browser.test_looks import check, make_chat

__all__ = ["make_chat"]


def message(chat: Chat, index: int = -1) -> Locator:
    return chat.page.locator(".user").nth(index)


def edit(chat: Chat, text: str, index: int = -1) -> None:
    """Ask anew in the place of a message, by the keyboard."""
    message(chat, index).get_by_role("button", name="Edit this message").click()
    box = chat.page.get_by_role("textbox", name="Your message, to ask anew")
    expect(box).to_be_focused()
    box.fill(text)
    box.press("Enter")
    expect(chat.page.locator(".editor")).to_have_count(0)
    expect(chat.status).to_have_text("Answer complete.", timeout=20_000)


def versions(chat: Chat, index: int = -1) -> Locator:
    return message(chat, index).get_by_role("group")


def test_a_message_is_edited_and_both_versions_are_there(chat: Chat) -> None:
    chat.ask("My name is Alice")
    chat.ask("What's my name?")
    edit(chat, "My name is Bob", 0)
    expect(chat.page.locator(".user")).to_have_count(1)
    expect(message(chat)).to_contain_text("My name is Bob")
    expect(versions(chat)).to_have_attribute("aria-label", "Version 2 of 2")
    expect(chat.box).to_be_focused()
    expect(chat.ask("What's my name?")).to_contain_text("Your name is Bob.")
    versions(chat, 0).get_by_role("button", name="Previous version").press("Enter")
    expect(chat.answer).to_contain_text("Your name is Alice.")
    expect(versions(chat, 0)).to_have_attribute("aria-label", "Version 1 of 2")
    following = versions(chat, 0).get_by_role("button", name="Next version")
    expect(following).to_be_focused()
    following.press("Enter")
    expect(chat.answer).to_contain_text("Your name is Bob.")
    chat.page.reload()
    expect(versions(chat, 0)).to_have_attribute("aria-label", "Version 2 of 2")
    expect(chat.answer).to_contain_text("Your name is Bob.")


def test_the_last_message_is_answered_again(chat: Chat) -> None:
    chat.ask("My name is Alice")
    for count in (2, 3):
        chat.page.get_by_role("button", name="Answer again").click()
        expect(versions(chat)).to_have_attribute(
            "aria-label", f"Version {count} of {count}"
        )
        expect(chat.status).to_have_text("Answer complete.", timeout=20_000)
    expect(chat.answers).to_have_count(1)
    expect(message(chat)).to_contain_text("My name is Alice")


def test_another_tab_follows(chat: Chat, context: BrowserContext) -> None:
    chat.ask("My name is Alice")
    other = Chat(chat.demo, context.new_page()).open(f"/c/{chat.conversation}/")
    expect(other.answers).to_have_count(1)
    # What is being edited there isn't lost with its message.
    message(other).get_by_role("button", name="Edit this message").click()
    other.page.get_by_role("textbox", name="Your message, to ask anew").fill("A draft")
    edit(chat, "My name is Bob")
    expect(message(other)).to_contain_text("My name is Bob")
    expect(versions(other)).to_have_attribute("aria-label", "Version 2 of 2")
    expect(other.box).to_have_value("A draft")
    versions(chat).get_by_role("button", name="Previous version").click()
    expect(message(other)).to_contain_text("My name is Alice")


def test_an_edit_is_given_up_and_nothing_has_happened(chat: Chat) -> None:
    chat.ask("My name is Alice")
    pencil = message(chat).get_by_role("button", name="Edit this message")
    pencil.click()
    chat.page.get_by_role("textbox", name="Your message, to ask anew").press("Escape")
    expect(pencil).to_be_focused()
    pencil.press("Enter")
    chat.page.get_by_role("button", name="Cancel").click()
    expect(pencil).to_be_focused()
    expect(message(chat)).to_contain_text("My name is Alice")
    expect(versions(chat)).to_have_count(0)


def test_nothing_is_edited_while_an_answer_is_written(chat: Chat) -> None:
    chat.begin_story()
    expect(chat.page.get_by_role("button", name="Answer again")).to_be_hidden()
    message(chat).get_by_role("button", name="Edit this message").click()
    expect(chat.status).to_have_text("Wait for the answer, or stop it with Esc.")
    expect(chat.page.locator(".editor")).to_have_count(0)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("language", ["en", "ar"])
def test_versions_look_right(
    make_chat: Callable[..., Chat], width: int, language: str, screenshots: Path
) -> None:
    chat = make_chat(viewport={"width": width, "height": 800})
    page = chat.page
    chat.ask("My name is Alice")
    edit(chat, "اسمي أليس" if language == "ar" else "My name is Bob")
    chat.ask("A long question " * 12)
    if language == "ar":
        page.evaluate("document.documentElement.dir = 'rtl'")
    check(page)
    fits = (
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate(fits)
    page.screenshot(path=screenshots / f"versions-{width}-{language}.png")
    message(chat).get_by_role("button", name="Edit this message").click()
    check(page)
    assert page.evaluate(fits)
    page.screenshot(path=screenshots / f"editor-{width}-{language}.png")
