"""Who gets in, what others see of a conversation, and what a text can't do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.chat import Chat, log_in, sign_in
from tests.browser.conftest import USERS
from tests.browser.demo import Demo

NASTY = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

NewContext = Callable[..., BrowserContext]


@pytest.fixture
def visitor(demo: Demo, new_context: NewContext) -> Page:
    """A browser of someone who isn't logged in."""
    return new_context().new_page()


def test_a_stranger_is_asked_who_it_is(demo: Demo, visitor: Page) -> None:
    visitor.goto(demo.url)
    expect(visitor).to_have_title("Sign in")
    visitor.get_by_role("button", name="Sign in as demo").click()
    expect(visitor.get_by_role("heading", name="What can I do")).to_be_visible()
    expect(visitor.locator(".who")).to_have_text("demo")
    visitor.get_by_role("button", name="Sign out").click()
    expect(visitor).to_have_title("Sign in")


def test_both_printed_passwords_work(demo: Demo, visitor: Page) -> None:
    printed = demo.output.read_text()
    for name, password in demo.passwords.items():
        assert f"user {name!r}, password {password!r}" in printed
        sign_in(demo, visitor, name, password)
        expect(visitor.locator(".who")).to_have_text(name)
        visitor.get_by_role("button", name="Sign out").click()
    sign_in(demo, visitor, "demo", "wrong")
    expect(visitor.get_by_role("alert")).to_have_text(
        "That name and password don't fit together."
    )


def test_a_second_user_sees_nothing(
    demo: Demo, chat: Chat, new_context: NewContext
) -> None:
    chat.ask("My name is Alice")
    context = new_context()
    log_in(demo, context, USERS[-1])
    other = Chat(demo, context.new_page()).open(f"/c/{chat.conversation}/")
    expect(other.page.locator("#banner-text")).to_have_text(
        "This conversation doesn't exist."
    )
    expect(other.box).to_be_disabled()
    expect(other.page.locator("#list li")).to_have_count(0)
    expect(other.log).to_be_empty()
    codes = [
        other.page.evaluate(
            "([path, method]) => fetch(path, {method, headers: {'X-CSRFToken': "
            "document.cookie.split('_csrf=')[1]}}).then(answer => answer.status)",
            [f"/agents/sessions/{chat.conversation}/{path}", method],
        )
        for path, method in [("messages/", "GET"), ("", "DELETE")]
    ]
    assert codes == [404, 404]
    # Neither can anyone tell an id that exists from one that doesn't.
    other.open("/c/no-such-thing/")
    expect(other.page.locator("#banner-text")).to_have_text(
        "This conversation doesn't exist."
    )
    expect(chat.ask("What's my name?")).to_contain_text("Alice")


def test_signing_out_ends_the_conversation_in_other_tabs(
    chat: Chat, context: BrowserContext
) -> None:
    chat.ask("Hello")
    other = Chat(chat.demo, context.new_page()).open("/")
    other.page.get_by_role("button", name="Sign out").click()
    expect(other.page).to_have_title("Sign in")
    chat.box.fill("Are you there?")
    chat.box.press("Enter")
    expect(chat.page).to_have_title("Sign in")


def test_what_was_written_when_the_session_ended_is_there_after_a_login(
    chat: Chat, context: BrowserContext, user: str
) -> None:
    chat.ask("Hello")
    conversation = chat.conversation
    other = Chat(chat.demo, context.new_page()).open("/")
    other.page.get_by_role("button", name="Sign out").click()
    expect(other.page).to_have_title("Sign in")
    chat.box.fill("Are you there?")
    chat.box.press("Enter")
    expect(chat.page).to_have_title("Sign in")
    sign_in(chat.demo, other.page, user)
    chat.open(f"/c/{conversation}/")
    expect(chat.box).to_have_value("Are you there?")


def test_each_message_has_the_direction_of_its_script(chat: Chat) -> None:
    chat.ask("\u05e9\u05dc\u05d5\u05dd (Hello)!")
    body = chat.page.locator(".user .body").last
    style = "element => getComputedStyle(element).direction"
    assert body.evaluate(style) == "rtl"
    chat.ask("Hello")
    assert chat.page.locator(".user .body").last.evaluate(style) == "ltr"
    chat.box.fill("\u05e9\u05dc\u05d5\u05dd")
    assert chat.box.evaluate(style) == "rtl"


def test_each_paragraph_has_the_direction_of_its_script(chat: Chat) -> None:
    """Text that begins at the right edge ends left of it."""
    chat.ask("Hello\n\u05e9\u05dc\u05d5\u05dd")
    chat.page.locator(".user .body").evaluate(
        """body => {
            const range = document.createRange();
            range.setStart(body.firstChild, 6);
            range.setEnd(body.firstChild, body.firstChild.length);
            body.style.width = "30rem";
            const [line, box] = [range, body].map(one => one.getBoundingClientRect());
            window.gaps = [line.left - box.left, box.right - line.right];
        }"""
    )
    left, right = chat.page.evaluate("window.gaps")
    assert right < 40 < 200 < left


def test_the_page_of_a_language_from_right_to_left(
    demo: Demo, new_context: NewContext
) -> None:
    page = new_context(locale="ar").new_page()
    page.goto(demo.url)
    assert page.evaluate("document.documentElement.dir") == "rtl"
    context = new_context(locale="ar")
    log_in(demo, context, USERS[-2])
    chat = Chat(demo, context.new_page()).open()
    assert chat.page.evaluate("document.documentElement.dir") == "rtl"
    chat.ask("Hello")
    box = chat.page.locator(".user .body").bounding_box()
    column = chat.page.locator("#log").bounding_box()
    assert box is not None
    assert column is not None
    # One's own messages stand at the end of the line.
    assert box["x"] - column["x"] < 10


def test_an_id_stands_in_its_place_below_any_prefix(chat: Chat) -> None:
    made = chat.page.evaluate(
        """async () => {
            const { page, url } = await import("/static/chat/text.js");
            page.urls.messages = `/IDEAS${page.urls.messages}`;
            page.urls.chat = "/IDEAS/";
            return [url("messages", "x/y"), url("chat")];
        }"""
    )
    assert made == ["/IDEAS/agents/sessions/x%2Fy/messages/", "/IDEAS/"]


def test_a_call_whose_id_comes_again_is_shown_too(chat: Chat) -> None:
    shown = chat.page.evaluate(
        """async () => {
            const { Transcript } = await import("/static/chat/transcript.js");
            const log = document.createElement("div");
            const transcript = new Transcript(log);
            for (const result of ["one", "two"]) {
                const call = { toolCallId: "call_0", toolCallName: "f" };
                transcript.apply({ type: "TOOL_CALL_START", ...call });
                transcript.apply({ type: "TOOL_CALL_RESULT", ...call, content: result });
            }
            return [...log.querySelectorAll("pre")].map((pre) =>
                pre.closest(".tool").querySelectorAll("pre").length + pre.textContent);
        }"""
    )
    assert shown == ["1one", "1two"]


def test_what_was_written_is_not_shown_to_the_next_person(
    chat: Chat, demo: Demo
) -> None:
    chat.box.fill("My secret")
    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page).to_have_title("Sign in")
    sign_in(demo, chat.page, USERS[-2])
    expect(chat.page.locator(".who")).to_have_text(USERS[-2])
    expect(chat.box).to_be_empty()


def test_markup_stays_text(chat: Chat) -> None:
    chat.ask(f"My name is {NASTY}")
    chat.ask("What did I ask first?")
    chat.page.reload()
    expect(chat.answers).to_have_count(2)
    expect(chat.page.locator(".user .body").first).to_contain_text(NASTY)
    expect(chat.answer).to_contain_text(NASTY)
    expect(chat.page.locator("#list .name").first).to_contain_text("<img src=x")
    expect(chat.page.get_by_role("heading", level=1)).to_contain_text("<img src=x")
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("main img, main script, nav img").count() == 0


def test_a_link_can_only_lead_to_the_web(chat: Chat) -> None:
    chat.ask("[a](javascript:alert(1)) [b](data:text/html,x) [c](https://example.org)")
    answer = chat.ask("What did I ask first?")
    links = answer.get_by_role("link")
    expect(links).to_have_count(1)
    expect(links).to_have_attribute("href", "https://example.org")
    expect(answer).to_contain_text("[a](javascript:alert(1))")


def test_the_policy_is_sent_and_holds(demo: Demo, browser: Browser) -> None:
    # Not from `new_context`, which would hold this violation against the page.
    page = browser.new_page()
    response = page.goto(f"{demo.url}/login/")
    assert response is not None
    assert response.headers["content-security-policy"] == POLICY
    blocked = page.evaluate(
        """() => new Promise(resolve => {
            document.addEventListener(
                "securitypolicyviolation", event => resolve(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.head.append(script);
        })"""
    )
    assert blocked == "script-src-elem"
    assert page.evaluate("window.hacked") is None
    page.close()
