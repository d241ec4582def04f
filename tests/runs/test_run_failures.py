"""What a developer learns of a run that failed, and a client doesn't."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from typing import Any

import pytest
from agents import Agent
from agents.testing import ModelStep, ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.test import override_settings

from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun
from tests.support.chat import Socket, create_conversation, make_user, text_of

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

LOGGER = "agent_sessions.runs"


async def conversation() -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user)
    return user, row.session_id


def broken(*more: Any) -> Agent[Any]:
    steps = [ModelStep.raise_error(RuntimeError("the model's words")), *more]
    return Agent(name="a", model=ScriptedModel(steps))


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == LOGGER]


def frames_of(error: BaseException | None) -> list[Any]:
    """Return the frames that an error's reports show, its causes' too."""
    found: list[Any] = []
    while error is not None:
        found += [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, False),
        ({"DEBUG": True}, True),
        ({"AGENT_SESSIONS_LOG_TRACEBACKS": True}, True),
        ({"DEBUG": True, "AGENT_SESSIONS_LOG_TRACEBACKS": False}, False),
    ],
)
async def test_the_traceback_is_logged_where_it_may_be(
    settings: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    user, session_id = await conversation()
    with override_settings(**settings), caplog.at_level("DEBUG", logger=LOGGER):
        async with Socket(session_id, user, broken()) as tab:
            await tab.say("r-1", "private words")
            events = await tab.to_end()
    assert events[-1]["code"] == "internal"
    assert "the model's words" not in json.dumps(tab.frames)
    [record] = records(caplog)
    assert record.getMessage() == "Run 'r-1' failed: internal (RuntimeError)"
    assert record.levelname == ("ERROR" if told else "WARNING")
    assert (record.exc_info is not None) == told
    assert ("Traceback (most recent call last)" in caplog.text) == told
    assert ("the model's words" in caplog.text) == told
    assert ("testing/model.py" in caplog.text) == told
    if record.exc_info:
        # Files and lines, but nothing of what the frames held.
        seen = repr([frame.f_locals for frame in frames_of(record.exc_info[1])])
        assert "private words" not in seen


class Reporting(AgentConsumer):
    """Keeps what it hears, then fails, as a reporting service may."""

    heard: list[Any] = []
    ends: Any = None

    def on_error(self, run: Any, exc: Exception) -> Any:
        self.heard.append((run.run_id, run.conversation.session_id, exc))
        if self.ends is not None:
            raise self.ends


class ReportingLater(Reporting):
    async def on_error(self, run: Any, exc: Exception) -> None:
        await asyncio.sleep(0)
        super().on_error(run, exc)


@pytest.mark.parametrize("consumer", [Reporting, ReportingLater])
@pytest.mark.parametrize("ends", [None, ValueError("of the hook"), TimeoutError()])
async def test_a_hook_hears_of_the_error_and_changes_nothing(
    consumer: Any, ends: Any, caplog: pytest.LogCaptureFixture
) -> None:
    user, session_id = await conversation()
    agent = broken([assistant_message("ok")])
    heard: list[Any] = []
    options = {"consumer": consumer, "heard": heard, "ends": ends}
    async with Socket(session_id, user, agent, **options) as tab:
        await tab.say("r-1", "Hi")
        events = await tab.to_end()
        await asyncio.sleep(0.1)
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "ok"
    assert events[-1]["code"] == "internal"
    assert "of the hook" not in json.dumps(tab.frames)
    [(run_id, of_session, exc)] = heard
    assert (run_id, of_session) == ("r-1", session_id)
    assert isinstance(exc, RuntimeError)
    assert str(exc) == "the model's words"
    assert "model.py" in "".join(traceback.format_exception(exc))
    run = await AgentRun.objects.aget(run_id="r-1")
    assert (run.status, run.error_code) == ("failed", "internal")
    logged = [r.getMessage() for r in records(caplog) if "on_error" in r.getMessage()]
    name = type(ends).__name__
    assert logged == ([f"on_error of run 'r-1' failed ({name})"] if ends else [])
    assert "of the hook" not in caplog.text


class Waiting(Reporting):
    async def on_error(self, run: Any, exc: Exception) -> None:
        self.heard.append(exc)
        await asyncio.Event().wait()


async def test_a_hook_that_hangs_holds_nothing_up() -> None:
    user, session_id = await conversation()
    agent = broken([assistant_message("ok")])
    heard: list[Any] = []
    async with Socket(session_id, user, agent, consumer=Waiting, heard=heard) as tab:
        await tab.say("r-1", "Hi")
        assert (await tab.to_end())[-1]["code"] == "internal"
        await tab.say("r-2", "Hi")
        assert text_of(await tab.to_end()) == "ok"
    assert len(heard) == 1


async def test_a_run_that_ends_well_is_no_error() -> None:
    user, session_id = await conversation()
    model = ScriptedModel([[assistant_message("ok")]])
    heard: list[Any] = []
    agent = Agent(name="a", model=model)
    async with Socket(session_id, user, agent, consumer=Reporting, heard=heard) as tab:
        await tab.say("r-1", "Hi")
        await tab.to_end()
        await asyncio.sleep(0.05)
    assert heard == []
