"""What the admin's pages look like, and whether everyone can use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.admin import AdminSite

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}
# What is ours inside another look, whose frame is not.
OURS = {"include": [["[class*=as-]"]]}
PAGES = ("list", "transcript", "overview", "clear", "runs", "run")

NewContext = Callable[..., BrowserContext]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    site = AdminSite(tmp_path_factory.mktemp("admin"), "tests.browser.admin_settings")
    site.start()
    yield site
    site.end()


@pytest.fixture(scope="module")
def unfold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    site = AdminSite(tmp_path_factory.mktemp("unfold"), "tests.browser.unfold_settings")
    site.start()
    yield site
    site.end()


def violations(page: Page, part: object = None) -> list[tuple[str, list[str]]]:
    """Return what axe finds: rules, and the elements that break them."""
    # That everything is inside a landmark is for the frame to see to.
    frame = {"rules": {"region": {"enabled": False}}} if part else {}
    found = Axe().run(page, context=part, options={**RULES, **frame})
    return [
        (rule["id"], [node["html"][:200] for node in rule["nodes"]])
        for rule in found.response["violations"]
    ]


def look(page: Page, name: str, screenshots: Path, part: object = None) -> None:
    """Take a screenshot of a page and let axe look at it, in light and in dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.screenshot(path=screenshots / f"{name}-{scheme}.png", full_page=True)
        assert violations(page, part) == [], scheme
    assert "hacked" not in page.title()


@pytest.mark.parametrize("name", PAGES)
def test_pages_look_right(
    site: AdminSite, new_context: NewContext, name: str, screenshots: Path
) -> None:
    """The screenshots are for people; axe looks at contrast, names and order."""
    # Axe writes styles into the page, which the policy would refuse.
    page = site.open(new_context(bypass_csp=True), name)
    look(page, f"admin-{name}", screenshots)


@pytest.mark.parametrize("name", ["transcript", "overview", "run"])
def test_pages_look_right_inside_unfold(
    unfold: AdminSite, new_context: NewContext, name: str, screenshots: Path
) -> None:
    page = unfold.open(new_context(), name)
    expect(page.locator("h1")).to_be_visible()
    look(page, f"unfold-{name}", screenshots, OURS)
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_strict_policy_holds_and_nothing_is_loaded_from_elsewhere(
    site: AdminSite, new_context: NewContext
) -> None:
    """The fixture looks for messages of the policy when the test has ended."""
    context = new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    for name in PAGES:
        page = site.open(context, name)
        assert "hacked" not in page.title()
    foreign = [url for url in asked if not url.startswith((site.url, "data:image/"))]
    assert foreign == []
    assert any("admin.css" in url for url in asked)


@pytest.mark.parametrize("name", ["transcript", "overview", "run"])
def test_at_400_percent_nothing_is_cut_off(
    site: AdminSite, new_context: NewContext, name: str, screenshots: Path
) -> None:
    # 1280 by 1024 pixels at 400 %.
    page = site.open(new_context(viewport={"width": 320, "height": 256}), name)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    page.screenshot(path=screenshots / f"admin-{name}-zoomed.png", full_page=True)


@pytest.mark.parametrize("name", ["list", "runs"])
def test_no_column_of_a_list_is_cut_off(
    site: AdminSite, new_context: NewContext, name: str
) -> None:
    page = site.open(new_context(viewport={"width": 1280, "height": 800}), name)
    table = page.locator(".results")
    assert table.evaluate("e => e.scrollWidth - e.clientWidth") == 0


@pytest.mark.parametrize("width", [1280, 1000, 390])
def test_buttons_of_a_session_lie_on_no_title(
    site: AdminSite, new_context: NewContext, width: int
) -> None:
    page = site.open(
        new_context(viewport={"width": width, "height": 800}), "transcript"
    )
    title = page.locator("#content > h2").bounding_box()
    buttons = page.locator(".object-tools li").first.bounding_box()
    assert title is not None
    assert buttons is not None
    assert buttons["y"] >= title["y"] + title["height"]


def test_from_right_to_left(
    site: AdminSite, new_context: NewContext, screenshots: Path
) -> None:
    page = site.open(new_context(locale="ar"), "transcript")
    expect(page.locator("html")).to_have_attribute("dir", "rtl")
    middle = "e => { const b = e.getBoundingClientRect(); return b.x + b.width / 2 }"
    user = page.locator(".as-user").first.evaluate(middle)
    assistant = page.locator(".as-assistant").first.evaluate(middle)
    assert user < assistant
    page.screenshot(path=screenshots / "admin-transcript-rtl.png", full_page=True)


def test_print_shows_all_and_leaves_out_what_paper_cannot_do(
    site: AdminSite, new_context: NewContext
) -> None:
    page = site.open(new_context(), "transcript")
    hidden = page.locator(".as-reasoning .as-text").first
    expect(hidden).to_be_hidden()
    page.emulate_media(media="print")
    expect(hidden).to_be_visible()
    for control in (".as-folding", ".as-raw >> nth=0", ".as-copy"):
        expect(page.locator(control)).to_be_hidden()


def test_pages_work_by_keyboard(site: AdminSite, new_context: NewContext) -> None:
    page = site.open(new_context(), "transcript")
    summary = page.locator(".as-reasoning summary").first
    thought = page.locator(".as-reasoning .as-text").first
    summary.focus()
    outline = summary.evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    expect(thought).to_be_visible()
    page.get_by_role("button", name="Collapse all").focus()
    page.keyboard.press("Enter")
    expect(thought).to_be_hidden()
    page.get_by_role("button", name="Expand all").focus()
    page.keyboard.press("Enter")
    expect(thought).to_be_visible()


def test_one_pages_through_a_long_history(
    site: AdminSite, new_context: NewContext
) -> None:
    page = site.open(new_context(), "long")
    message = page.locator(".as-text")
    expect(message.last).to_have_text("Message 249")
    above = page.get_by_role("navigation", name="Pages of the transcript, top")
    expect(above.get_by_role("link", name="Later")).to_have_count(0)
    above.get_by_role("link", name="Earlier").click()
    expect(message.last).to_have_text("Message 149")
    above.get_by_role("link", name="Earlier").click()
    expect(message.first).to_have_text("Message 0")
    expect(above.get_by_role("link", name="Earlier")).to_have_count(0)
    above.get_by_role("link", name="Later").click()
    expect(message.first).to_have_text("Message 50")
    above.get_by_role("link", name="Newest").click()
    expect(message.last).to_have_text("Message 249")
