"""Tools that ask first."""

from __future__ import annotations

from playwright.sync_api import BrowserContext, expect

from tests.browser.chat import Chat


def wait_for_approval(chat: Chat) -> None:
    chat.send("Refund order 42")
    expect(chat.approval).to_be_visible()
    expect(chat.approval).to_contain_text('"order_id": 42')
    expect(chat.approval).to_contain_text("expires")
    expect(chat.box).to_be_disabled()
    expect(chat.status).to_have_text("Answer the request above to go on.")


def test_an_approved_tool_runs(chat: Chat) -> None:
    wait_for_approval(chat)
    chat.approval.get_by_role("button", name="Approve").click()
    expect(chat.answer).to_contain_text("Done: I refunded")
    expect(chat.approval).to_have_count(0)
    expect(chat.page.locator(".tool .state")).to_have_text("done")
    expect(chat.box).to_be_focused()
    expect(chat.ask("What did I ask first?")).to_contain_text("“Refund order 42”")


def test_the_focus_stays_in_the_conversation(chat: Chat) -> None:
    chat.send("Refund order 42 and 43")
    expect(chat.approval).to_have_count(2)
    expect(chat.approval.first).to_be_focused()
    chat.page.keyboard.press("Tab")
    expect(chat.approval.first.get_by_role("button", name="Approve")).to_be_focused()
    chat.page.keyboard.press("Enter")
    expect(chat.approval.last).to_be_focused()
    chat.page.keyboard.press("Tab")
    chat.page.keyboard.press("Enter")
    expect(chat.answer).to_contain_text("Done: I refunded")
    expect(chat.box).to_be_focused()


def test_a_focus_that_is_elsewhere_is_left_there(chat: Chat) -> None:
    chat.send("Refund order 42")
    theme = chat.page.locator("#theme")
    theme.focus()
    expect(chat.approval).to_be_visible()
    expect(theme).to_be_focused()


def test_a_refused_tool_does_not_run_and_learns_why(chat: Chat) -> None:
    wait_for_approval(chat)
    chat.approval.get_by_label("Reason for refusing").fill("It never broke")
    chat.approval.get_by_role("button", name="Refuse").click()
    expect(chat.answer).to_contain_text("I didn't refund anything")
    expect(chat.answer).to_contain_text("It never broke")
    expect(chat.box).to_be_focused()


def test_a_request_survives_a_reload(chat: Chat) -> None:
    wait_for_approval(chat)
    chat.page.reload()
    expect(chat.approval).to_be_visible()
    expect(chat.box).to_be_disabled()
    expect(chat.page.locator("#list .waiting")).to_be_visible()
    chat.approval.get_by_role("button", name="Approve").click()
    expect(chat.answer).to_contain_text("Done: I refunded")


def test_several_requests_are_answered_together(chat: Chat) -> None:
    chat.send("Refund order 42 and 43")
    expect(chat.approval).to_have_count(2)
    expect(chat.status).to_contain_text("2 left")
    chat.approval.first.get_by_role("button", name="Approve").click()
    expect(chat.approval.first).to_contain_text("Approved")
    expect(chat.status).to_have_text("Answer the request above to go on.")
    chat.approval.last.get_by_role("button", name="Refuse").click()
    expect(chat.answer).to_contain_text("for order 42")
    expect(chat.answer).to_contain_text("I didn't refund anything")


def test_another_tab_asks_too_and_forgets_once_answered(
    chat: Chat, context: BrowserContext
) -> None:
    wait_for_approval(chat)
    other = Chat(chat.demo, context.new_page()).open(f"/c/{chat.conversation}/")
    expect(other.approval).to_be_visible()
    other.approval.get_by_role("button", name="Approve").click()
    for tab in (chat, other):
        expect(tab.answer).to_contain_text("Done: I refunded")
        expect(tab.approval).to_have_count(0)
        expect(tab.box).to_be_enabled()
