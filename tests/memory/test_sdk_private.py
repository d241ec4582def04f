"""What agent_sessions.memory.sdk calls is there in the release that is installed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from agents import Agent, handoff
from agents.memory import OpenAIConversationsSession

from agent_sessions.memory import sdk


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        (OpenAIConversationsSession, "_get_session_id", set()),
    ],
)
def test_the_sdk_has_what_is_called(kind: Any, name: str, arguments: set[str]) -> None:
    method = getattr(kind, name)
    assert inspect.iscoroutinefunction(method)
    assert arguments <= inspect.signature(method).parameters.keys()


def test_a_handoff_has_the_agent_that_it_leads_to() -> None:
    target: Agent[Any] = Agent(name="target")
    assert sdk.handoff_target(handoff(target)) is target
    assert sdk.handoff_target(SimpleNamespace()) is None
