"""What the Runner gets for a run of the websocket, and who decides it."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from datetime import timedelta
from typing import Any

import pytest
from agents import Agent, RunConfig, RunHooks
from agents.extensions.memory import EncryptedSession as SDKEncryptedSession
from agents.memory import OpenAIResponsesCompactionSession
from agents.testing import ScriptedModel, assistant_message, function_call
from agents.tracing import Trace, get_trace_provider
from agents.tracing.processor_interface import TracingProcessor
from cryptography.fernet import Fernet
from django.core.cache import cache
from openai import AsyncOpenAI

from agent_sessions.agui import FrameError, parse_request
from agent_sessions.consumers import AgentConsumer
from agent_sessions.exceptions import InvalidBackend, InvalidConsumer
from agent_sessions.handler import SessionBackendHandler
from agent_sessions.memory import BackendSession
from agent_sessions.memory.encrypted import EncryptedSession
from agent_sessions.models import AgentRun, SessionItem
from agent_sessions.runs import RunLimits
from tests.memory.test_compaction import SUMMARY, Compactor, compactor  # noqa: F401
from tests.runs.test_runs import approve
from tests.support.approvals import lookup, refund, refunded
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import conversation, speaker

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    refunded.clear()


async def texts_of(session_id: str) -> list[str]:
    items = SessionItem.objects.filter(branch__session__session_id=session_id)
    return [item.data async for item in items.order_by("position")]


# -- the session -----------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
async def test_a_run_compacts_through_the_session_of_the_hook(
    compactor: Compactor,  # noqa: F811
    plain: bool,
) -> None:
    client = AsyncOpenAI(base_url=compactor.url, api_key="k")

    def around(session: Any) -> Any:
        return OpenAIResponsesCompactionSession(
            session.session_id,
            session,
            client=client,
            model="gpt-5-mini",
            compaction_mode="input",
            should_trigger_compaction=lambda context: True,
        )

    class Plain(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            return around(session)

    class Async(AgentConsumer):
        async def get_session(self, session: Any) -> Any:
            return around(session)

    user, session_id = await conversation()
    kind = Plain if plain else Async
    async with Socket(session_id, user, speaker("one"), consumer=kind) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "success"}
    assert [path for path, _ in compactor.requests] == ["/v1/responses/compact"]
    branch = SessionItem.objects.filter(branch__session__session_id=session_id)
    kinds = [
        item.type
        async for item in branch.filter(branch__name="main", branch__version=0)
    ]
    assert kinds[-1:] == [SUMMARY["type"]]


class Hiding(BackendSession):
    """Stores items in a form of its own."""

    async def add_items(self, items: Any, **options: Any) -> None:
        hidden: Any = [
            {"role": "user", "content": b64encode(json.dumps(item).encode()).decode()}
            for item in items
        ]
        await super().add_items(hidden, **options)

    async def get_items(self, limit: Any = None, **options: Any) -> Any:
        items: Any = await super().get_items(limit, **options)
        return [json.loads(b64decode(item["content"])) for item in items]


def around_by_option(session: Any) -> Any:
    return Hiding.from_key(session.backend, session.key)


async def test_an_alias_wraps_the_sessions_of_runs(settings: Any) -> None:
    settings.AGENT_SESSIONS = {
        "default": {
            "BACKEND": "agent_sessions.backends.database.DatabaseBackend",
            "OPTIONS": {"run_session": "tests.runs.test_run_options.around_by_option"},
        }
    }
    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one", "two")) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "one"
    stored = await texts_of(session_id)
    assert len(stored) == 2
    assert all("role" not in json.loads(text)["content"] for text in stored)
    assert not any("one" in text or "Hi" in json.loads(text) for text in stored)


async def test_what_a_stopped_run_said_is_stored_through_what_wraps() -> None:
    class Wrapping(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            return around_by_option(session)

    user, session_id = await conversation()
    agent, model = gated("a secret answer")
    async with Socket(session_id, user, agent, consumer=Wrapping) as tab:
        await tab.say("r-1", "Hi")
        await tab.until("TEXT_MESSAGE_CONTENT")
        await tab.send({"type": "abort", "runId": "r-1"})
        model.gate.set()
        await tab.to_end()
    stored = await texts_of(session_id)
    assert len(stored) == 2
    assert not any("secret" in text for text in stored)


@pytest.mark.parametrize(
    "kind", [EncryptedSession, SDKEncryptedSession], ids=["ours", "theirs"]
)
async def test_a_session_that_encrypts_is_the_aliass_to_give(kind: Any) -> None:
    """What is told of a run lies beside its items, and would be in clear."""

    class Wrapping(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            return kind("s", session, Fernet.generate_key().decode())

    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one"), consumer=Wrapping) as tab:
        await tab.say("r-1", "a secret")
        end = (await tab.to_end())[-1]
    assert (end["type"], end["code"]) == ("RUN_ERROR", "internal")
    assert not await texts_of(session_id)


async def test_a_hook_that_gives_no_session_fails_the_run() -> None:
    class Forgetful(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            return None

    user, session_id = await conversation()
    async with Socket(session_id, user, speaker("one"), consumer=Forgetful) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert (events[-1]["type"], events[-1]["code"]) == ("RUN_ERROR", "internal")
    run = await AgentRun.objects.aget(run_id="r-1")
    assert run.status == "failed"


@pytest.mark.parametrize("wrap", ["", "nodots", 5])
def test_an_option_that_is_no_function_is_refused(wrap: Any) -> None:
    handler = SessionBackendHandler(
        {
            "default": {
                "BACKEND": "agent_sessions.backends.database.DatabaseBackend",
                "OPTIONS": {"run_session": wrap},
            }
        }
    )
    with pytest.raises(InvalidBackend, match="run_session"):
        handler["default"]


# -- the Runner's arguments ------------------------------------------------------------


class Heard(RunHooks[Any]):
    def __init__(self) -> None:
        self.names: list[str] = []

    async def on_agent_start(self, context: Any, agent: Any) -> None:
        self.names.append(agent.name)


async def test_hooks_are_called_for_a_run() -> None:
    user, session_id = await conversation()
    heard = Heard()
    async with Socket(session_id, user, speaker("one"), hooks=heard) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert heard.names == ["speaker"]


def looping() -> Agent[Any]:
    steps = [
        [function_call("lookup", {"order": str(n)}, call_id=f"call_{n}")]
        for n in range(5)
    ]
    return Agent(name="looping", model=ScriptedModel(steps), tools=[lookup])


@pytest.mark.parametrize(
    "options", [{"max_turns": 2}, {"limits": RunLimits(max_turns=2)}]
)
async def test_a_run_takes_no_more_turns_than_it_may(options: Any) -> None:
    user, session_id = await conversation()
    agent = looping()
    async with Socket(session_id, user, agent, **options) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["code"] == "max_turns"
    assert isinstance(agent.model, ScriptedModel)
    assert len(agent.model.calls) == 2


async def test_a_run_may_have_turns_of_its_own() -> None:
    class ByUser(AgentConsumer):
        limits = RunLimits(max_turns=1)

        async def get_max_turns(self) -> int:
            return 3

    user, session_id = await conversation()
    agent = looping()
    async with Socket(session_id, user, agent, consumer=ByUser) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert isinstance(agent.model, ScriptedModel)
    assert len(agent.model.calls) == 3


async def test_an_error_handler_answers_in_the_place_of_an_error() -> None:
    user, session_id = await conversation()
    handlers = {"max_turns": lambda given: "Ask me something shorter."}
    async with Socket(
        session_id, user, looping(), max_turns=1, error_handlers=handlers
    ) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
    assert events[-1]["outcome"] == {"type": "success"}
    assert text_of(events) == "Ask me something shorter."


class Groups(TracingProcessor):
    def __init__(self) -> None:
        self.found: list[str | None] = []

    def on_trace_start(self, trace: Trace) -> None:
        exported = trace.export() or {}
        self.found.append(exported.get("group_id"))

    def on_trace_end(self, trace: Trace) -> None: ...
    def on_span_start(self, span: Any) -> None: ...
    def on_span_end(self, span: Any) -> None: ...
    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


@pytest.mark.parametrize(
    ("config", "group"),
    [(None, None), (RunConfig(), None), (RunConfig(group_id="mine"), "mine")],
)
async def test_traces_of_a_session_are_one_group(config: Any, group: Any) -> None:
    user, session_id = await conversation()
    provider, groups = get_trace_provider(), Groups()
    provider.set_processors([groups])
    provider.set_disabled(False)
    try:
        async with Socket(session_id, user, speaker("one"), run_config=config) as tab:
            await tab.say("r-1", "Hi")
            await tab.to_end()
    finally:
        provider.set_disabled(True)
        provider.set_processors([])
    assert groups.found == [group or session_id]
    if config is not None:
        # The app's own isn't changed: other sessions use it too.
        assert config.group_id == group


# -- answers that last -----------------------------------------------------------------


def call(number: int) -> Any:
    return function_call("refund", {"order": str(number)}, call_id=f"call_{number}")


def clerk(*steps: Any) -> Agent[Any]:
    return Agent(
        name="clerk",
        model=ScriptedModel([*steps, [assistant_message("done")]]),
        tools=[refund],
    )


@pytest.mark.parametrize("approved", [True, False])
async def test_an_answer_may_be_for_all_later_calls_of_the_tool(approved: bool) -> None:
    user, session_id = await conversation()
    agent = clerk([call(1)], [call(2)], [call(3)])
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund them")
        await tab.to_end()
        await tab.answer(
            "r-2", approve("call_1", approved=approved, always=True, reason="policy")
        )
        assert text_of(await tab.to_end()) == "done"
    assert refunded == (["1", "2", "3"] if approved else [])


async def test_an_answer_without_always_is_for_one_call() -> None:
    user, session_id = await conversation()
    agent = clerk([call(1)], [call(2)])
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund them")
        await tab.to_end()
        await tab.answer("r-2", approve("call_1", always=False))
        events = await tab.to_end()
        assert events[-1]["outcome"]["interrupts"][0]["toolCallId"] == "call_2"
    assert refunded == ["1"]


async def test_always_is_kept_while_another_tool_asks() -> None:
    @refund_like
    def cancel(order: str) -> str:
        """Cancel an order."""
        return f"cancelled {order}"

    user, session_id = await conversation()
    agent = clerk(
        [call(1)],
        [function_call("cancel", {"order": "9"}, call_id="call_9")],
        [call(2)],
    )
    agent.tools.append(cancel)
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund them")
        await tab.to_end()
        await tab.answer("r-2", approve("call_1", always=True))
        events = await tab.to_end()
        assert events[-1]["outcome"]["interrupts"][0]["toolCallId"] == "call_9"
        await tab.answer("r-3", approve("call_9"))
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["1", "2"]


def refund_like(function: Any) -> Any:
    from agents import function_tool

    return function_tool(needs_approval=True)(function)


@pytest.mark.parametrize("refused_first", [True, False])
async def test_a_refused_call_stays_refused_beside_one_that_is_always_approved(
    refused_first: bool,
) -> None:
    """The SDK forgets what was said of single calls when a lasting answer comes."""
    user, session_id = await conversation()
    agent = clerk([call(1), call(2)], [call(3)])
    one, other = ("call_1", "call_2") if refused_first else ("call_2", "call_1")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund them")
        await tab.to_end()
        await tab.answer(
            "r-2", approve(one, approved=False), approve(other, always=True)
        )
        assert text_of(await tab.to_end()) == "done"
    assert refunded == [other.removeprefix("call_"), "3"]


async def test_of_lasting_answers_that_contradict_the_refusal_lasts() -> None:
    user, session_id = await conversation()
    agent = clerk([call(1), call(2)], [call(3)])
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Refund them")
        await tab.to_end()
        await tab.answer(
            "r-2",
            approve("call_1", approved=False, always=True),
            approve("call_2", always=True),
        )
        assert text_of(await tab.to_end()) == "done"
    assert refunded == ["2"]


@pytest.mark.parametrize("always", ["true", 1, 0, [], {}])
def test_always_is_true_or_false(always: Any) -> None:
    with pytest.raises(FrameError):
        parse_request(
            {
                "threadId": "t",
                "runId": "r",
                "resume": [approve(always=always)],
            }
        )


@pytest.mark.parametrize(
    "named",
    [
        {"approval_timeout": "1d"},
        {"run_timeout": 0},
        {"stale_after": -1},
        {"stale_after": float("nan")},
        {"heartbeat": "20"},
        {"keep_log": -1},
        {"max_turns": 0},
        {"max_turns": True},
        {"merge_size": 1.5},
        # Others would take the run for dead between two of its heartbeats.
        {"heartbeat": 60},
        {"heartbeat": 90, "stale_after": 300},
        {"stale_after": 5},
    ],
    ids=repr,
)
def test_limits_under_which_no_run_could_be(named: dict[str, Any]) -> None:
    with pytest.raises(InvalidConsumer, match="RunLimits: "):
        RunLimits(**named)


def test_an_approval_s_time_in_seconds() -> None:
    """As all others are."""
    seconds: Any = 90
    assert RunLimits(approval_timeout=seconds).approval_timeout == timedelta(seconds=90)
