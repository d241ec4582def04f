"""A project's method that raises ends what asked it, and says that it is no outage."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.core.exceptions import PermissionDenied
from django.db import OperationalError, ProgrammingError
from django.test import Client
from django.utils.translation import override

from agent_sessions.consumers import AgentConsumer
from agent_sessions.exceptions import InvalidConsumer
from agent_sessions.models import AgentRun
from agent_sessions.runs.failures import MESSAGES, REFUSALS, message_for
from agent_sessions.streams import AgentRunView
from tests.support.chat import Socket, refusal_of, text_of
from tests.support.streams import Http
from tests.websocket.test_consumer import conversation, speaker

pytestmark = pytest.mark.django_db(transaction=True)

ERRORS: list[BaseException] = [
    LookupError("secret"),
    FileNotFoundError("secret"),
    ProgrammingError("no such table"),
    InvalidConsumer("secret"),
    asyncio.CancelledError(),
]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


def raising(error: BaseException, *, at: int = 1) -> Any:
    """Return an authorize() that raises from its call number `at` on."""
    calls: list[Any] = []

    def hook(*args: Any) -> bool:
        calls.append(args)
        if len(calls) >= at:
            raise error
        return True

    return hook


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("at", [1, 2])
async def test_a_check_that_fails_closes_with_a_code_of_its_own(
    error: BaseException, at: int
) -> None:
    user, session_id = await conversation()
    options: Any = {"authorize": raising(error, at=at), "recheck_after": 60}
    async with Socket(session_id, user, speaker("x"), **options) as tab:
        if at == 2:
            await tab.say("r-1", "Hi")
        assert await tab.closed() == 4500
    assert await AgentRun.objects.acount() == 0


@pytest.mark.parametrize(
    ("error", "code"), [(OperationalError("gone"), 4503), (PermissionDenied(), 4403)]
)
async def test_what_a_check_says_of_databases_and_rights_is_heard(
    error: Exception, code: int
) -> None:
    user, session_id = await conversation()
    options: Any = {"authorize": raising(error)}
    async with Socket(session_id, user, speaker("x"), **options) as tab:
        assert await tab.closed() == code


HOOKS = [
    "get_agent",
    "get_context",
    "get_run_config",
    "get_hooks",
    "get_error_handlers",
    "get_max_turns",
    "check_rate",
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", HOOKS)
async def test_what_is_asked_before_a_run_ends_in_internal(
    name: str, error: BaseException
) -> None:
    user, session_id = await conversation()
    options: Any = {name: raising(error)}
    async with Socket(session_id, user, speaker("x"), **options) as tab:
        await tab.say("r-1", "Hi")
        chunk = (await tab.frame())["chunk"]
        assert (chunk["code"], chunk["metadata"]["runId"]) == ("internal", "r-1")
    async with Http(session_id, speaker("x"), **options) as http:
        await http.login(user)
        events = await (await http.run("r-1", "Hi")).to_end()
        assert [event["type"] for event in events] == ["RUN_STARTED", "RUN_ERROR"]
        assert events[-1]["code"] == "internal"


@pytest.mark.parametrize("error", [*ERRORS, OperationalError("gone")])
@pytest.mark.parametrize("gives", ["error", 5, "x" * 600, None])
async def test_a_language_that_fails_leaves_the_readers(
    error: BaseException, gives: Any
) -> None:
    user, session_id = await conversation()

    def get_language() -> Any:
        if gives == "error":
            raise error
        return gives

    german = [(b"accept-language", b"de")]
    options: Any = {"get_language": get_language}
    agent = speaker("one", "two")
    async with Socket(session_id, user, agent, headers=german, **options) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "one"
        await tab.send("nonsense")
        refused = (await tab.frame())["chunk"]["message"]
        with override("de"):
            assert refused == message_for("bad_request")
    async with Http(session_id, agent, **options) as http:
        await http.login(user)
        assert text_of(await (await http.run("r-2", "Hi")).to_end()) == "two"


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ["authorize", "get_token_user"])
async def test_a_stream_that_is_not_opened_says_internal(
    name: str, error: BaseException
) -> None:
    user, session_id = await conversation()
    async with Http(session_id, speaker("x"), **{name: raising(error)}) as http:
        await http.login(user)
        for response in (await http.post("runs"), await http.get("events")):
            assert response.status_code == 500
            assert json.loads(response.content) == refusal_of("internal")


@pytest.mark.parametrize("name", ["get_agent", "get_capabilities"])
async def test_capabilities_that_fail_are_told_as_json(name: str) -> None:
    user, session_id = await conversation()
    options: Any = {name: raising(LookupError())}
    async with Http(session_id, speaker("x"), **options) as http:
        await http.login(user)
        response = await http.get("capabilities")
        assert response.status_code == 500
        assert json.loads(response.content) == refusal_of("internal")


@pytest.mark.parametrize("code", ["not_found", "method_not_allowed", "not_logged_in"])
async def test_each_refusal_of_http_has_a_sentence_for_its_reader(code: str) -> None:
    user, session_id = await conversation()
    german = {"Accept-Language": "de"}

    def views() -> Any:
        client = Client(headers=german)
        if code != "not_logged_in":
            client.force_login(user)
        path = f"/agents/sessions/{session_id}/messages/"
        if code == "method_not_allowed":
            return client.put(path)
        return client.get(path if code != "not_found" else path.replace("-", "x"))

    answers = [await sync_to_async(views)()]
    async with Http(session_id, speaker("x")) as http:
        ask: Any = partial(http.client.get, headers=german)
        kind = "application/json"
        send: Any = partial(http.client.post, content_type=kind, headers=german)
        if code != "not_logged_in":
            await http.login(user)
        if code == "method_not_allowed":
            answers.append(await ask(http.address("runs/r-1/stop")))
        elif code == "not_found":
            answers.append(await send(http.address("runs/r-9/stop")))
        else:
            answers.append(await ask(http.address("events")))
    with override("en"):
        english = str(REFUSALS[code])
    with override("de"):
        expected = {"code": code, "message": str(REFUSALS[code])}
    assert expected["message"] != english
    assert [json.loads(answer.content) for answer in answers] == [expected, expected]


async def test_the_end_of_a_stream_is_told_in_its_own_words() -> None:
    user, session_id = await conversation()
    options: Any = {"authorize": raising(LookupError(), at=2), "recheck_after": 0}
    async with Http(session_id, speaker("x"), **options) as http:
        await http.login(user)
        events = await (await http.run("r-1", "Hi")).to_end()
        assert (events[-1]["code"], events[-1]["message"]) == (
            "internal",
            str(MESSAGES["internal"]),
        )
    answers = iter([True, False])
    rule: Any = {"authorize": lambda *args: next(answers), "recheck_after": 0}
    other, second = await conversation()
    async with Http(second, speaker("x"), **rule) as http:
        await http.login(other)
        events = await (await http.run("r-1", "Hi")).to_end()
        assert events[-1]["message"] == str(REFUSALS["forbidden"])


def test_every_hook_of_both_doors_is_tried_here() -> None:
    """What a run's own task asks ends the run, as tests of runs show."""
    asked_by_runs = {"get_session", "on_error", "open_run"}
    own = {"authorize", "get_language", "get_token_user", "get_capabilities"}
    known = {*HOOKS, *asked_by_runs, *own}
    for kind in (AgentConsumer, AgentRunView):
        named = {
            name
            for name in dir(kind)
            if name.startswith(("get_", "check_rate", "authorize", "on_", "open_"))
        }
        assert named - {"get_up"} <= known
