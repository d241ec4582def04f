"""AgentRunView: who may, what is refused, what is offered."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from ag_ui.core.capabilities import AgentCapabilities
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test import (
    AsyncClient,
    AsyncRequestFactory,
    RequestFactory,
    override_settings,
)
from django.utils.translation import override
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from agent_sessions.exceptions import InvalidBackend, InvalidConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs.failures import MESSAGES
from agent_sessions.streams import AgentRunView
from tests.agui.test_agui_fuzz import NEAR
from tests.support.chat import make_user, refusal_of, text_of
from tests.support.gated import gated
from tests.support.ratelimits import early_in_the_minute
from tests.support.streams import Http, streamed
from tests.websocket.test_consumer import conversation, speaker
from tests.websocket.test_streams import listeners

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()


# -- who is there ----------------------------------------------------------------------


async def test_strangers_get_nothing() -> None:
    user, session_id = await conversation()
    other = await sync_to_async(make_user)()
    async with Http(session_id, speaker("x")) as http:
        for _ in range(2):
            wanted = 401 if not http.client.cookies else 404
            for name in ("runs", "runs/r-1/stop"):
                assert (await http.post(name)).status_code == wanted
            for name in ("events", "capabilities"):
                response = await http.get(name)
                assert response.status_code == wanted
                assert response["Content-Type"] == "application/json"
            await http.login(other)
        http.session_id = "no such session"
        assert (await http.post("runs")).status_code == 404
    async with Http(session_id, speaker("x"), authorize=lambda *a: False) as http:
        await http.login(user)
        response = await http.post("runs")
        assert response.status_code == 403
        assert json.loads(response.content) == refusal_of("forbidden")
    assert await AgentRun.objects.acount() == 0


async def test_who_logs_out_hears_no_more_and_ends_no_run() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    options: dict[str, Any] = {"recheck_after": 0, "comment_interval": 0.05}
    async with Http(session_id, agent, **options) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        await model.paused.wait()
        await stream.until("TEXT_MESSAGE_START")
        await http.client.alogout()
        events = await stream.to_end()
        assert events[-1]["code"] == "not_logged_in"
        assert await listeners(user, session_id) == 0
        await http.login(user)
        model.gate.set()
        joined = await (await http.events()).to_end()
        assert joined[-1]["outcome"] == {"type": "success"}


async def test_a_session_needs_a_csrf_token_and_a_token_none() -> None:
    user, session_id = await conversation()

    class Tokens(AgentRunView):
        async def get_token_user(self, request: Any) -> Any:
            is_known = request.headers.get("Authorization") == "Bearer good"
            return user if is_known else None

    body = {
        "threadId": session_id,
        "runId": "r-1",
        "messages": [{"id": "u", "role": "user", "content": "Hi"}],
    }
    agent = speaker("one")
    async with Http(session_id, agent, view=Tokens, enforces_csrf=True) as http:
        response = await http.post("runs", body, Authorization="Bearer bad")
        assert response.status_code == 403
        await http.login(user)
        assert (await http.post("runs", body)).status_code == 403
        assert await AgentRun.objects.acount() == 0
        token = "a" * 32
        http.client.cookies["csrftoken"] = token
        refused = await http.post("runs", {}, **{"X-CSRFToken": token})
        assert refused.status_code == 200
        await http.client.alogout()
        http.client.cookies.clear()
        response = await http.post("runs", body, Authorization="Bearer good")
        assert response.status_code == 200
        assert b"one" in b"".join([part async for part in response])


async def test_a_token_that_is_withdrawn_ends_the_stream() -> None:
    user, session_id = await conversation()
    agent, model = gated("one two three")
    known = [user]
    async with Http(
        session_id,
        agent,
        recheck_after=0,
        comment_interval=0.05,
        get_token_user=lambda request: known[0],
    ) as http:
        stream = await http.run("r-1", "Hi")
        await stream.until("TEXT_MESSAGE_START")
        known[0] = None
        events = await stream.to_end()
        assert events[-1]["code"] == "not_logged_in"
        model.gate.set()


# -- refusals --------------------------------------------------------------------------


async def test_a_refusal_is_a_run_that_fails() -> None:
    early_in_the_minute()
    user, session_id = await conversation()
    agent, model = gated("one two three")
    picture = {"type": "url", "value": "https://x.test/a.png"}
    image = {"type": "image", "source": picture}
    async with Http(session_id, agent, max_runs_per_minute=2) as http:
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        await model.paused.wait()
        answers = [
            await http.run("r-2", "Me too"),
            await http.run("r-3", "x" * 40_000),
            await http.run("r-4", "Hi", threadId="other"),
            await http.send(
                runId="r-5",
                messages=[{"id": "u", "role": "user", "content": [image]}],
            ),
            await http.run("r-6", "Hi"),
            await http.send(type="sync"),
        ]
        codes = []
        for answer in answers:
            events = await answer.to_end()
            assert [event["type"] for event in events] == ["RUN_STARTED", "RUN_ERROR"]
            assert answer.ids == [None, None]
            assert events[1]["metadata"] == {"runId": events[0]["runId"]}
            codes.append(events[1]["code"])
        assert codes == [
            "session_busy",
            "message_too_long",
            "bad_request",
            "bad_request",
            "rate_limited",
            "bad_request",
        ]
        model.gate.set()
        assert text_of(await stream.to_end()) == "one two three"


async def test_requests_for_what_was_said_are_counted() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("x"), max_user_frames_per_minute=1) as http:
        await http.login(user)
        await (await http.events()).to_end()
        response = await http.get("events")
        assert response.status_code == 429
        assert response["Retry-After"]
        assert (await http.stop("r-1")).status_code == 404
        assert (await http.stop("r-1")).status_code == 429


async def test_a_body_that_is_too_large_is_refused() -> None:
    user, session_id = await conversation()
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=100):
        async with Http(session_id, speaker("x")) as http:
            await http.login(user)
            response = await http.post("runs", {"messages": ["x" * 100]})
    assert response.status_code == 413


async def test_what_a_hook_raises_is_the_runs_error() -> None:
    class Broken(AgentRunView):
        def get_context(self) -> Any:
            raise LookupError("secret")

    user, session_id = await conversation()
    async with Http(session_id, speaker("x"), view=Broken) as http:
        await http.login(user)
        events = await (await http.run("r-1", "Hi")).to_end()
    assert events[-1]["code"] == "internal"
    assert "secret" not in json.dumps(events)


async def test_a_sentence_is_in_the_readers_language() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("x")) as http:
        await http.login(user)
        response = await http.post("runs", {}, **{"Accept-Language": "de"})
        told = b"".join([part async for part in response]).decode()
    with override("de"):
        sentence = str(MESSAGES["bad_request"])
    assert json.dumps(sentence) in told


async def test_whatever_a_client_sends_is_answered_legally() -> None:
    """The fuzz test of the other wire, tests/agui/test_agui_fuzz.py, on this one."""
    user, session_id = await conversation()
    async with Http(session_id, speaker(*["x"] * 200)) as http:
        await http.login(user)

        async def send(content: Any) -> None:
            response = await http.post("runs", content)
            events = await streamed(response).to_end()
            assert events[-1]["type"] in {"RUN_ERROR", "RUN_FINISHED"}

        @examples(max_examples=60, deadline=None)
        @given(st.binary() | NEAR.map(json.dumps))
        def fuzz(content: Any) -> None:
            async_to_sync(send)(content)

        await sync_to_async(fuzz)()


# -- what is offered -------------------------------------------------------------------


async def test_the_capabilities_are_those_of_ag_ui() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("x")) as http:
        await http.login(user)
        response = await http.get("capabilities")
    told = json.loads(response.content)
    assert told["identity"] == {"name": "speaker"}
    read = AgentCapabilities.model_validate(told)
    assert read.model_dump(by_alias=True, exclude_none=True) == told


async def test_a_route_says_which_methods_it_has() -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("x")) as http:
        await http.login(user)
        stop: Any = await http.client.get(http.address("runs/r-1/stop"))
        told = await http.post("capabilities")
        hello = {"id": "u-1", "role": "user", "content": "Hi"}
        asked = {"threadId": session_id, "runId": "r-1", "messages": [hello]}
        heard = await http.post("events", asked)
    assert [(each.status_code, each["Allow"]) for each in (stop, told, heard)] == [
        (405, "POST"),
        (405, "GET"),
        (405, "GET"),
    ]
    assert not await AgentRun.objects.aexists()


async def test_a_route_may_name_more_than_the_session() -> None:
    user, session_id = await conversation()
    view = cast("Any", AgentRunView.as_view(agent=speaker("Hello")))
    request: Any = AsyncRequestFactory().get("/")
    request.user = user
    response = await view(request, session_id=session_id, team="support")
    assert response.status_code == 200


def test_a_misspelt_option_is_refused_at_once() -> None:
    agent = speaker("x")
    with pytest.raises(InvalidConsumer, match="Did you mean 'max_turns'"):
        AgentRunView.as_urls(agent=agent, max_turn=1)
    with pytest.raises(InvalidConsumer, match=r"AgentRunView\.as_view\(agent=…\)"):
        AgentRunView.as_view()
    with pytest.raises(InvalidBackend):
        AgentRunView.as_view(agent=agent, backend="nope")


async def test_it_works_behind_middleware_and_atomic_requests(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django.contrib.auth.middleware.LoginRequiredMiddleware",
        "django.middleware.gzip.GZipMiddleware",
    ]
    user, session_id = await conversation()
    async with Http(session_id, speaker("Hello")) as http:
        assert (await http.get("events")).status_code == 401
        http.client = AsyncClient(headers={"Accept-Encoding": "gzip"})
        await http.login(user)
        stream = await http.run("r-1", "Hi")
        assert stream.response["Content-Encoding"] == "identity"
        assert text_of(await stream.to_end()) == "Hello"
    assert await AgentSession.objects.acount() == 1


def test_without_asgi_it_says_what_it_needs() -> None:
    user = make_user()
    view = AgentRunView.as_view(agent=speaker("x"))

    request = RequestFactory().post("/")
    request.user = user
    with pytest.raises(ImproperlyConfigured, match="needs an ASGI server"):
        async_to_sync(view)(request, session_id="s")  # type: ignore[arg-type]
