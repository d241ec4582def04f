"""The list beside the chat: finding, making and deleting conversations."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.chat import Chat

LONG_HISTORY = """
import sys, django
django.setup()
from django.contrib.auth import get_user_model
from agent_sessions import get_session
user = get_user_model().objects.get(username=sys.argv[1])
session = get_session(sys.argv[2], user=user)
session.sync.add_items([
    {"role": role, "content": f"{role} {number}"}
    for number in range(150) for role in ("user", "assistant")
])
"""


def test_conversations_are_listed_and_reopened(chat: Chat) -> None:
    page = chat.page
    expect(page.locator("#list-note")).to_be_visible()
    chat.ask("My name is Alice")
    first = chat.conversation
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("heading", name="What can I do for you?")).to_be_visible()
    expect(chat.log).to_be_empty()
    chat.ask("What's my name?")
    expect(chat.answer).to_contain_text("You haven't told me your name")
    assert chat.conversation != first
    expect(page.locator("#list .name")).to_have_text(
        ["What's my name?", "My name is Alice"]
    )
    expect(page).to_have_title("What's my name?")
    page.locator("#list").get_by_text("My name is Alice").click()
    expect(chat.answer).to_contain_text("Nice to meet you, Alice!")
    assert chat.conversation == first
    expect(page.locator("#list [aria-current=page]")).to_contain_text(
        "My name is Alice"
    )
    expect(page).to_have_title("My name is Alice")
    page.go_back()
    expect(chat.answer).to_contain_text("You haven't told me your name")
    page.go_back()
    expect(page.get_by_role("heading", name="What can I do for you?")).to_be_visible()
    page.go_forward()
    expect(chat.answer).to_contain_text("You haven't told me your name")


def test_leaving_a_conversation_does_not_stop_its_answer(chat: Chat) -> None:
    chat.begin_story()
    page = chat.page
    page.get_by_role("link", name="New conversation").click()
    expect(chat.log).to_be_empty()
    expect(page.locator("#list .running")).to_be_visible()
    page.locator("#list").get_by_text("Tell me a story").click()
    expect(chat.answer).to_contain_text("talking still.", timeout=20_000)


def test_deleting_asks_first(chat: Chat) -> None:
    chat.ask("My name is Alice")
    page = chat.page
    path = f"/c/{chat.conversation}/"
    remove = page.get_by_role("button", name="Delete My name is Alice")
    remove.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Delete “My name is Alice” and everything in it?")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(remove).to_be_focused()
    remove.click()
    dialog.get_by_role("button", name="Keep it").click()
    expect(page.locator("#list li")).to_have_count(1)
    remove.click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.locator("#list li")).to_have_count(0)
    expect(chat.status).to_have_text("The conversation is deleted.")
    expect(chat.log).to_be_empty()
    chat.open(path)
    expect(page.locator("#banner-text")).to_have_text(
        "This conversation doesn't exist."
    )


def test_an_answering_conversation_is_not_deleted(chat: Chat) -> None:
    chat.begin_story()
    chat.page.get_by_role("button", name="Delete Tell me a story").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chat.status).to_have_text("Stop the answer first, then delete.")
    expect(chat.page.locator("#list li")).to_have_count(1)


def test_earlier_messages_are_loaded_on_demand(chat: Chat, user: str) -> None:
    chat.ask("Hello")
    chat.demo.run("-c", LONG_HISTORY, user, chat.conversation)
    page = chat.page
    page.reload()
    expect(chat.answer).to_contain_text("assistant 149")
    entries = page.locator(".log > .entry")
    expect(entries).to_have_count(100)
    earlier = page.get_by_role("button", name="Load earlier")
    expect(chat.log).not_to_contain_text("user 99")
    earlier.click()
    expect(entries).to_have_count(200)
    earlier.click()
    expect(entries).to_have_count(300)
    earlier.click()
    expect(entries).to_have_count(302)
    expect(earlier).to_be_hidden()
    expect(entries.first).to_contain_text("Hello")
    ids = entries.evaluate_all("all => new Set(all.map(one => one.dataset.id)).size")
    assert ids == 302


def test_a_reader_further_up_stays_there(chat: Chat, user: str) -> None:
    chat.ask("Hello")
    chat.demo.run("-c", LONG_HISTORY, user, chat.conversation)
    chat.page.reload()
    expect(chat.answer).to_contain_text("assistant 149")
    scroller = chat.page.locator("#scroller")
    chat.begin_story()
    scroller.evaluate("view => { view.scrollTop = 100 }")
    jump = chat.page.get_by_role("button", name="New messages")
    expect(jump).to_be_visible()
    assert scroller.evaluate("view => view.scrollTop") == 100
    jump.click()
    expect(jump).to_be_hidden()
    expect(chat.answer).to_be_in_viewport()
    expect(chat.answer).to_have_attribute("aria-busy", "false", timeout=20_000)
    left = "view => view.scrollHeight - view.scrollTop - view.clientHeight"
    assert scroller.evaluate(left) < 2
