"""Who may hold a socket, for how long, and how many: revoked ones hear nothing more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.auth import AuthMiddlewareStack
from django.conf import settings as django_settings
from django.contrib.auth import HASH_SESSION_KEY, get_user_model
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.core.cache import cache
from django.db import OperationalError
from django.test import Client
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import Conversation, event_rows, get_run_manager
from agent_sessions.runs.event_rows import About, Chunk, Unwritten
from agent_sessions.runs.log import Frame, group_of
from tests.support.chat import Closed, Socket, make_user, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, speaker

pytestmark = pytest.mark.django_db(transaction=True)

Revoke = Callable[["Browser"], None]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


class Browser:
    """A logged-in browser with one conversation."""

    def __init__(self, user: Any, session_id: str) -> None:
        self.user = user
        self.session_id = session_id
        self.client = Client()
        self.client.force_login(user)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        name = django_settings.SESSION_COOKIE_NAME
        cookie = f"{name}={self.client.cookies[name].value}"
        return [(b"cookie", cookie.encode())]

    def tab(self, agent: Any, **options: Any) -> Socket:
        """Open a socket as a project does, through Channels' middleware."""
        options.setdefault("around", AuthMiddlewareStack)
        return Socket(self.session_id, None, agent, headers=self.headers, **options)


async def browser(user: Any = None, session_id: str = "") -> Browser:
    if user is None:
        user, session_id = await conversation()
    return await sync_to_async(Browser)(user, session_id)


async def seen_user(tab: Socket) -> None:
    await tab.sync()
    await tab.to_end()


class Choosy(AgentConsumer):
    """A consumer whose rule is a permission that may be taken away."""

    async def authorize(self, user: Any, session_id: str) -> bool:
        return str(user.first_name) != "banned"


# -- ways to lose the right ------------------------------------------------------------


def log_out(browser: Browser) -> None:
    browser.client.logout()


def log_out_everywhere(browser: Browser) -> None:
    Session.objects.all().delete()


def expire(browser: Browser) -> None:
    Session.objects.update(expire_date=timezone.now() - timedelta(seconds=1))


def change_password(browser: Browser) -> None:
    browser.user.set_password("another")
    browser.user.save()


def disable(browser: Browser) -> None:
    get_user_model().objects.filter(pk=browser.user.pk).update(is_active=False)


def delete_user(browser: Browser) -> None:
    browser.user.delete()


def log_in_another(browser: Browser) -> None:
    browser.client.force_login(make_user())


def put_another_into_the_session(browser: Browser) -> None:
    other = make_user()
    store = SessionStore(browser.client.session.session_key)
    store["_auth_user_id"] = str(other.pk)
    store[HASH_SESSION_KEY] = other.get_session_auth_hash()
    store.save()


def ban(browser: Browser) -> None:
    get_user_model().objects.filter(pk=browser.user.pk).update(first_name="banned")


def delete_session(browser: Browser) -> None:
    AgentSession.objects.filter(session_id=browser.session_id).delete()


def give_session_away(browser: Browser) -> None:
    rows = AgentSession.objects.filter(session_id=browser.session_id)
    rows.update(user=make_user())


REVOKED: list[tuple[Revoke, int]] = [
    (log_out, 4401),
    (log_out_everywhere, 4401),
    (expire, 4401),
    (change_password, 4401),
    (disable, 4401),
    (delete_user, 4401),
    (log_in_another, 4401),
    (put_another_into_the_session, 4401),
    (ban, 4403),
    (delete_session, 4404),
    (give_session_away, 4404),
]
FRAMES: dict[str, dict[str, Any]] = {
    "sync": {"text": '{"type":"sync"}'},
    "abort": {"text": '{"type":"abort","runId":"r-1"}'},
    "garbage": {"text": "{"},
    "unknown type": {"text": '{"type":"hello"}'},
    "binary": {"bytes": b"{}"},
    "empty": {"text": ""},
    "too large": {"text": "x" * 70_000},
}


def run_frame(session_id: str) -> dict[str, Any]:
    message = {"id": "u-1", "role": "user", "content": "Still here?"}
    frame = {"threadId": session_id, "runId": "r-9", "messages": [message]}
    return {"text": json.dumps(frame)}


@pytest.mark.one_database
@pytest.mark.parametrize("kind", [*FRAMES, "run"])
@pytest.mark.parametrize(
    ("revoke", "code"), REVOKED, ids=[revoke.__name__ for revoke, _ in REVOKED]
)
async def test_the_next_frame_of_a_revoked_socket_closes_it(
    revoke: Revoke, code: int, kind: str
) -> None:
    """channels 718 and 1324: a logged-out user keeps the socket and its history."""
    there = await browser()
    async with there.tab(speaker("no"), consumer=Choosy) as tab:
        await tab.sync()
        await tab.to_end()
        await sync_to_async(revoke)(there)
        frame = run_frame(there.session_id) if kind == "run" else FRAMES[kind]
        await tab.communicator.send_input({"type": "websocket.receive", **frame})
        # Nothing but the code: no snapshot, no refusal, no event.
        with pytest.raises(Closed) as closed:
            await tab.frame()
        assert closed.value.code == code
        await tab.sync()
        assert await tab.silent(0.05)
    assert not await AgentRun.objects.filter(run_id="r-9").aexists()


@pytest.mark.parametrize(
    ("revoke", "code"), REVOKED, ids=[revoke.__name__ for revoke, _ in REVOKED]
)
async def test_a_revoked_socket_closes_by_itself(revoke: Revoke, code: int) -> None:
    there = await browser()
    async with there.tab(speaker(), consumer=Choosy, recheck_interval=0.1) as tab:
        await tab.sync()
        await tab.to_end()
        await sync_to_async(revoke)(there)
        assert await tab.closed() == code


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("engine", "revoke"),
    [
        ("cache", log_out),
        ("cached_db", log_out),
        ("file", log_out),
        ("file", log_in_another),
        # Its log-out happens in the browser alone.
        ("signed_cookies", change_password),
        ("signed_cookies", disable),
    ],
)
async def test_every_session_engine_is_read_again(
    engine: str, revoke: Revoke, settings: Any, tmp_path: Path
) -> None:
    settings.SESSION_ENGINE = f"django.contrib.sessions.backends.{engine}"
    settings.SESSION_FILE_PATH = str(tmp_path)
    there = await browser()
    async with there.tab(speaker()) as tab:
        await tab.sync()
        await tab.to_end()
        await sync_to_async(revoke)(there)
        await tab.sync()
        with pytest.raises(Closed) as closed:
            await tab.frame()
        assert closed.value.code == 4401


async def test_a_timer_leaves_those_alone_who_may_stay() -> None:
    there = await browser()
    async with there.tab(speaker("yes"), recheck_interval=0.02) as tab:
        assert await tab.silent(0.3)
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"


async def test_a_revoked_socket_stops_nothing() -> None:
    user, session_id = await conversation()
    there, elsewhere = await browser(user, session_id), await browser(user, session_id)
    agent, model = gated("one two three four")
    async with there.tab(agent) as tab, elsewhere.tab(agent) as other:
        await other.say("r-1", "Hi")
        await model.paused.wait()
        await tab.sync()
        await sync_to_async(log_out)(there)
        await tab.send({"type": "abort", "runId": "r-1"})
        assert await tab.closed() == 4401
        model.gate.set()
        events = await other.to_end()
    assert text_of(events) == "one two three four"
    assert events[-1]["outcome"] == {"type": "success"}


@pytest.mark.parametrize("options", [{"recheck_after": 0}, {"recheck_interval": 0.1}])
async def test_a_running_answer_is_not_heard_after_a_log_out(
    options: dict[str, float],
) -> None:
    user, session_id = await conversation()
    there, elsewhere = await browser(user, session_id), await browser(user, session_id)
    found = await Conversation.find(session_id, user=user)
    agent, model = gated("one two three four")
    async with there.tab(agent, **options) as tab, elsewhere.tab(agent) as other:
        await other.say("r-1", "Hi")
        await model.paused.wait()
        await tab.sync()
        await tab.until("TEXT_MESSAGE_CONTENT")
        assert get_run_manager().listeners(found) == 2
        await sync_to_async(log_out)(there)
        if "recheck_interval" in options:
            assert await tab.closed() == 4401
            assert get_run_manager().listeners(found) == 1
        model.gate.set()
        assert text_of(await other.to_end()) == "one two three four"
        if "recheck_after" in options:
            with pytest.raises(Closed):
                await tab.frame()
        assert get_run_manager().listeners(found) == 1
        assert await tab.silent(0.05)


async def test_a_run_of_another_process_is_not_heard_after_a_log_out() -> None:
    there = await browser()
    found = await Conversation.find(there.session_id, user=there.user)
    run = AgentRun(session_id=found.pk, run_id="r-1")
    started = {"type": "RUN_STARTED", "threadId": there.session_id, "runId": "r-1"}
    custom = {"type": "CUSTOM", "name": "x", "value": 1}

    async def say(number: int, event: dict[str, Any]) -> None:
        chunk = Chunk([Frame("r-1", number, event)], About())
        told = Unwritten(found, run, 0, [chunk])
        rows = await sync_to_async(event_rows.rows_of)(told)
        await found.backend.threads.run(run_rows.add_events, found.using, rows)

    async with there.tab(speaker(), recheck_after=0) as tab:
        await tab.sync()
        await tab.to_end()
        lease = {"run_owner": "elsewhere:1:x", "run_seen_at": timezone.now()}
        await run.asave()
        await found.rows().aupdate(run_id="r-1", state="running", fence=7, **lease)
        await say(1, started)
        assert (await tab.frame())["chunk"]["runId"] == "r-1"
        await sync_to_async(log_out)(there)
        await say(2, custom)
        with pytest.raises(Closed) as closed:
            await tab.frame()
        assert closed.value.code == 4401
        await say(3, custom)
        assert await tab.silent(0.05)


async def test_the_next_owner_of_a_session_is_not_heard() -> None:
    """Not even before anybody has looked: it is another place and another group."""
    there = await browser()
    found = await Conversation.find(there.session_id, user=there.user)
    heir = await sync_to_async(make_user)()
    async with there.tab(speaker()) as tab:
        await tab.sync()
        await tab.to_end()
        rows = AgentSession.objects.filter(session_id=there.session_id)
        await rows.aupdate(user=heir)
        after = await Conversation.find(there.session_id, user=heir)
        assert group_of(after) != group_of(found)
        async with Socket(there.session_id, heir, speaker("private")) as other:
            await other.say("r-1", "Hi")
            await other.to_end()
        assert await tab.silent()


async def test_streaming_asks_no_more_often_than_it_must() -> None:
    asked = []

    class Counting(AgentConsumer):
        def authorize(self, user: Any, session_id: str) -> bool:
            asked.append(session_id)
            return True

    there = await browser()
    agent, model = gated("word " * 2_000)
    model.gate.set()
    # However slow the machine is: no event asks by itself.
    patient: Any = {"recheck_after": 1_000, "recheck_interval": 1_000}
    async with there.tab(agent, consumer=Counting, **patient) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert len(events) > 10
    # Once for the handshake, once for the frame.
    assert len(asked) == 2


# -- checks that fail ------------------------------------------------------------------


@pytest.mark.parametrize("error", [OperationalError("gone"), RuntimeError("a bug")])
@pytest.mark.parametrize("at_a_frame", [True, False])
async def test_a_check_that_cannot_be_made_closes_the_socket(
    error: Exception, at_a_frame: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(AgentConsumer):
        failure: Exception | None = None

        def authorize(self, user: Any, session_id: str) -> bool:
            if self.failure is not None and Failing.failure is not None:
                raise Failing.failure
            return True

    there = await browser()
    interval = 60 if at_a_frame else 0.1
    options: Any = {"consumer": Failing, "recheck_interval": interval}
    async with there.tab(speaker(), **options) as tab:
        await tab.sync()
        await tab.to_end()
        Failing.failure = error
        if at_a_frame:
            await tab.sync()
        code = 4503 if isinstance(error, OperationalError) else 4500
        assert await tab.closed() == code
    (record,) = (r for r in caplog.records if r.name == "agent_sessions.consumers")
    # A traceback where it is the project's code that has to be corrected.
    is_known = isinstance(error, OperationalError)
    assert (record.exc_info is None) is is_known
    what = "was closed" if is_known else "broke"
    assert record.getMessage() == f"A socket {what} ({type(error).__name__})"


async def test_while_a_check_hangs_nothing_is_heard() -> None:
    user, session_id = await conversation()
    ready = asyncio.Event()

    class Slow(AgentConsumer):
        slow = False

        async def authorize(self, user: Any, session_id: str) -> bool:
            if Slow.slow:
                ready.set()
                await asyncio.Event().wait()
            return True

    agent, model = gated("one two three four")
    async with (
        Socket(session_id, user, agent) as other,
        Socket(session_id, user, agent, consumer=Slow, recheck_after=0) as tab,
    ):
        await other.say("r-1", "Hi")
        await model.paused.wait()
        await tab.sync()
        await tab.until("TEXT_MESSAGE_CONTENT")
        Slow.slow = True
        model.gate.set()
        await other.to_end()
        await ready.wait()
        assert await tab.silent()
