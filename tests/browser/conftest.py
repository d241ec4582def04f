"""A demo for all tests, a browser, and a user of its own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.browser.chat import Chat, log_in
from tests.browser.demo import Demo

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
USERS = [f"user-{number}" for number in range(80)]
SCREENSHOTS = Path(__file__).resolve().parents[2] / ".cache" / "screenshots"

OpenChat = Callable[..., Chat]


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo, running, with users made."""
    demo = Demo(tmp_path_factory.mktemp("demo"))
    demo.start()
    demo.make_users(*USERS)
    yield demo
    code = None if demo.alive else demo.end()
    demo.end()
    assert code is None, f"it ended with {code}: {demo.output.read_text()}"


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    return iter(count())


@pytest.fixture
def user(numbers: Iterator[int]) -> str:
    """A user whom no other test talks as: runs are limited by user and minute."""
    return USERS[next(numbers)]


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Make browser contexts, and look at the end that nothing broke on any page."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if "Content Security Policy" in message.text
                else None
            ),
        )

    def new_context(**options: object) -> BrowserContext:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        context.set_default_timeout(15_000)
        context.on("page", watch)
        contexts.append(context)
        return context

    yield new_context
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def context(
    demo: Demo, user: str, new_context: Callable[..., BrowserContext]
) -> BrowserContext:
    """A browser in which the test's user is logged in."""
    context = new_context()
    log_in(demo, context, user)
    return context


@pytest.fixture
def chat(demo: Demo, context: BrowserContext) -> Chat:
    """The empty page in a first tab."""
    return Chat(demo, context.new_page()).open()


@pytest.fixture
def screenshots() -> Path:
    """A folder out of git for what a person should look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS
