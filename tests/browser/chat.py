"""The page as its user sees it: what one can do on it, and what it shows."""

from __future__ import annotations

import re

from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.demo import PASSWORD, Demo


class Chat:
    """One tab."""

    def __init__(self, demo: Demo, page: Page) -> None:
        self.demo = demo
        self.page = page
        self.log = page.get_by_role("log")
        self.box = page.get_by_role("textbox", name="Message", exact=True)
        self.answers = page.locator(".assistant")
        self.status = page.locator("#status")
        self.stop = page.get_by_role("button", name="Stop")
        self.approval = page.get_by_role("group", name="May I call refund_order?")

    @property
    def answer(self) -> Locator:
        return self.answers.last

    @property
    def conversation(self) -> str:
        """The id in the address."""
        found = re.search(r"/c/([^/]+)/$", self.page.url)
        assert found, self.page.url
        return found[1]

    def open(self, path: str = "/") -> Chat:
        self.page.goto(self.demo.url + path)
        return self

    def send(self, text: str) -> None:
        expect(self.box).to_be_enabled()
        expect(self.stop).to_be_hidden()
        self.box.fill(text)
        self.box.press("Enter")
        expect(self.page.locator(".user").last).to_contain_text(text)

    def ask(self, text: str) -> Locator:
        """Send and wait for the end of the answer."""
        self.send(text)
        expect(self.status).to_have_text("Answer complete.", timeout=20_000)
        return self.answer

    def begin_story(self) -> None:
        """Ask for a long answer and return in the middle of it."""
        self.send("Tell me a story")
        expect(self.answer).to_contain_text("worries", timeout=15_000)
        expect(self.answer).to_have_attribute("aria-busy", "true")


def log_in(demo: Demo, context: BrowserContext, user: str) -> None:
    """Log a browser in with the session of a user."""
    context.add_cookies(
        [
            {
                "name": "agent_sessions_demo",
                "value": demo.cookies[user],
                "url": demo.url,
            }
        ]
    )


def sign_in(demo: Demo, page: Page, user: str, password: str = PASSWORD) -> None:
    """Fill the form in, as a person does."""
    page.goto(f"{demo.url}/login/")
    page.get_by_label("Name").fill(user)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in", exact=True).click()
