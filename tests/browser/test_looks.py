"""What the page looks like, and whether everyone can use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.chat import Chat, log_in
from tests.browser.demo import Demo

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}


def check(page: Page) -> None:
    """Expect that axe finds nothing to complain about."""
    found = Axe().run(page, options=RULES)
    assert found.response["violations"] == [], found.generate_report()


@pytest.fixture
def make_chat(
    demo: Demo, user: str, new_context: Callable[..., BrowserContext]
) -> Callable[..., Chat]:
    def make_chat(**options: object) -> Chat:
        context = new_context(**options)
        log_in(demo, context, user)
        return Chat(demo, context.new_page()).open()

    return make_chat


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_looks_right(
    make_chat: Callable[..., Chat], scheme: str, screenshots: Path
) -> None:
    """The screenshots are for people; axe looks at contrast, names and order."""
    chat = make_chat(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    page = chat.page

    def shoot(name: str) -> None:
        check(page)
        page.screenshot(path=screenshots / f"{name}-{scheme}.png")

    expect(page.locator("#list-note")).to_be_visible()
    shoot("empty")
    chat.ask("My name is Alice. Show me some formatting")
    chat.ask("What's the weather in Lisbon?")
    page.locator(".tool summary").last.click()
    shoot("tools")
    chat.ask("Are there invoices to pay?")
    shoot("handoff")
    chat.begin_story()
    page.screenshot(path=screenshots / f"streaming-{scheme}.png")
    chat.stop.click()
    expect(chat.log.get_by_text("Stopped.")).to_be_visible()
    chat.send("Refund order 42")
    expect(chat.approval).to_be_visible()
    shoot("approval")
    page.get_by_role("button", name="Delete My name is Alice").click()
    shoot("confirm")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_login_page_looks_right(
    demo: Demo,
    new_context: Callable[..., BrowserContext],
    scheme: str,
    screenshots: Path,
) -> None:
    page = new_context(color_scheme=scheme).new_page()
    page.goto(f"{demo.url}/login/")
    check(page)
    page.screenshot(path=screenshots / f"login-{scheme}.png")


def test_a_narrow_window_moves_the_list_into_a_dialog(
    make_chat: Callable[..., Chat], screenshots: Path
) -> None:
    chat = make_chat(viewport={"width": 360, "height": 700})
    page = chat.page
    chat.ask("Where is order 41? " + "x" * 200)
    chat.ask("Show me some formatting")
    expect(page.locator("#sidebar")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.screenshot(path=screenshots / "narrow.png")
    page.get_by_role("button", name="Conversations").click()
    drawer = page.get_by_role("dialog", name="Conversations")
    expect(drawer.get_by_role("link", name="New conversation")).to_be_visible()
    check(page)
    page.screenshot(path=screenshots / "drawer.png")
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    drawer.get_by_role("link", name="New conversation").click()
    expect(drawer).to_be_hidden()
    expect(page.get_by_role("heading", name="What can I do for you?")).to_be_visible()
    check(page)
    page.set_viewport_size({"width": 1000, "height": 700})
    expect(page.locator("#sidebar").get_by_role("link").first).to_be_visible()


def test_at_400_percent_nothing_is_cut_off(
    make_chat: Callable[..., Chat], screenshots: Path
) -> None:
    # 1280 by 1024 pixels at 400 %.
    chat = make_chat(viewport={"width": 320, "height": 256})
    chat.ask("Hello")
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 320
    expect(chat.box).to_be_in_viewport()
    expect(chat.answer).to_be_in_viewport()
    height = chat.page.locator("#scroller").evaluate("(view) => view.clientHeight")
    assert height >= 140
    chat.page.screenshot(path=screenshots / "zoomed.png")


def test_forced_colours_and_less_motion(
    make_chat: Callable[..., Chat], screenshots: Path
) -> None:
    chat = make_chat(forced_colors="active", reduced_motion="reduce")
    chat.begin_story()
    animation = chat.page.evaluate(
        "getComputedStyle(document.querySelector('.tail'), '::after').animationName"
    )
    assert animation == "none"
    chat.page.screenshot(path=screenshots / "forced-colours.png")


def test_the_theme_is_kept(make_chat: Callable[..., Chat]) -> None:
    page = make_chat(color_scheme="light").page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Colours: as on this device").click()
    page.get_by_role("button", name="Colours: light").click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    page.get_by_role("button", name="Colours: dark").click()
    assert page.evaluate(paper) == light
    expect(
        page.get_by_role("button", name="Colours: as on this device")
    ).to_be_visible()


def test_the_page_works_by_keyboard(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat()
    page = chat.page
    expect(chat.box).to_be_focused()
    chat.ask("Hello")
    page.reload()
    expect(chat.answers).to_have_count(1)
    skip = page.get_by_role("link", name="Skip to the message box")
    skip.focus()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(chat.box).to_be_focused()
    page.get_by_role("link", name="New conversation").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#list a")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Delete Hello")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()


def test_a_screen_reader_hears_whole_messages(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat()
    expect(chat.log).to_have_attribute("aria-live", "polite")
    chat.begin_story()
    expect(chat.answer).to_have_attribute("aria-busy", "true")
    expect(chat.answer).to_have_attribute("aria-busy", "false", timeout=20_000)
    expect(chat.page.get_by_role("status").last).to_have_text("Answer complete.")
