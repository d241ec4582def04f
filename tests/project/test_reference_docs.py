"""docs/reference.md, held against the code."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from datetime import timedelta
from inspect import get_annotations
from typing import Any

import pytest
from django.db.models import Model
from django.urls import reverse

from agent_sessions import DjangoSession, get_session
from agent_sessions.agui import StreamOptions
from agent_sessions.consumers import AgentConsumer
from agent_sessions.handler import CHAT_BACKEND
from agent_sessions.mixins import AgentMixin
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import RunLimits, find_agent
from agent_sessions.signals import session_cleared
from agent_sessions.sockets import GuardedSocket
from agent_sessions.streams import AgentRunView
from agent_sessions.testing.base import say, scripted
from agent_sessions.views import (
    SessionAPIView,
    SessionListView,
    SessionMessagesView,
    SessionView,
)
from agent_sessions.workers import WorkerMixin
from tests.support.chat import make_user
from tests.support.documents import blocks, page, section

REFERENCE = page("docs/reference.md")


def rows(title: str) -> dict[str, str]:
    """Return the first two columns of the table below a heading."""
    text = re.split(rf"^#+ {re.escape(title)}$", REFERENCE, flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table
    found = {}
    for line in table[0].splitlines()[2:]:
        name, value = line.split("|")[1:3]
        found[name.strip(" `")] = value.strip(" `")
    return found


def written(value: Any) -> str:
    """Return a default as the page writes it."""
    if isinstance(value, RunLimits | StreamOptions):
        assert value == type(value)()
        return f"{type(value).__name__}()"
    return (
        f'"{value}"' if isinstance(value, str) else repr(value).split("datetime.")[-1]
    )


@pytest.mark.parametrize("kind", [RunLimits, StreamOptions])
def test_every_field_is_told_with_its_default(kind: Any) -> None:
    made = kind()
    told = rows(f"`{kind.__name__}`")
    assert told.keys() == {field.name for field in fields(kind)}
    for name, value in told.items():
        assert value == written(getattr(made, name))


def test_every_attribute_of_the_consumer_is_told() -> None:
    public = {
        name
        for kind in (WorkerMixin, AgentMixin, GuardedSocket, AgentConsumer)
        for name in get_annotations(kind)
        if not name.startswith("_") and hasattr(kind, name)
    }
    told = rows("`AgentConsumer`")
    assert told.keys() == public
    assert told.pop("backend") == CHAT_BACKEND
    for name, value in told.items():
        assert value == written(getattr(AgentConsumer, name))


def test_every_attribute_of_the_streams_is_told() -> None:
    own = {n for n in get_annotations(AgentRunView) if not n.startswith("_")}
    told = rows("`AgentRunView`")
    assert told == {name: written(getattr(AgentRunView, name)) for name in own}
    shared = get_annotations(AgentMixin) | get_annotations(WorkerMixin)
    text = section(REFERENCE, "`AgentRunView`").split("|")[0]
    left_out = rows("`AgentConsumer`").keys() - shared.keys()
    named = set(re.findall(r"`(\w+)`", text)) - {"as_view", "as_urls", "AgentConsumer"}
    assert named == left_out | {"max_sockets", "max_sockets_per_user"}


def test_every_attribute_of_the_views_is_told() -> None:
    views = (SessionAPIView, SessionListView, SessionView, SessionMessagesView)
    public = {name for kind in views for name in get_annotations(kind)}
    told = rows("The views")
    assert told.keys() == public
    assert told["page_size"] == (
        f"{SessionListView.page_size}`, `{SessionMessagesView.page_size}"
    )
    assert told["max_bytes"] == str(SessionMessagesView.max_bytes)
    sessions = SessionListView.max_sessions_per_minute
    assert told["max_sessions_per_minute"] == str(sessions)
    for name in re.findall(r"`(agent_sessions:\w+)`", section(REFERENCE, "The views")):
        kept = {} if name == "agent_sessions:sessions" else {"session_id": "s"}
        assert reverse(name, kwargs=kept)


@pytest.mark.parametrize("model", [AgentSession, AgentRun])
def test_every_field_of_a_model_is_told(model: type[Model]) -> None:
    told = rows(f"`{model.__name__}`")
    assert told.keys() == {f.name for f in model._meta.fields if f.name != "id"}


def test_the_states_are_those_of_the_models() -> None:
    for model, name, states in (
        (AgentSession, "state", AgentSession.State.values),
        (AgentRun, "status", AgentRun.Status.values),
    ):
        told = rows(f"`{model.__name__}`")[name]
        assert re.findall(r"\w+", told) == states


@pytest.mark.django_db(transaction=True)
def test_the_receiver_hears_of_a_clear(caplog: pytest.LogCaptureFixture) -> None:
    user = make_user()
    session = get_session("s", user=user)
    session.sync.add_items([{"role": "user", "content": "Hi"}])
    [code] = blocks(REFERENCE, "python")
    namespace: dict[str, Any] = {}
    before = list(session_cleared.receivers)
    try:
        exec(code, namespace)
        with caplog.at_level(logging.INFO, "audit"):
            session.sync.clear_session()
    finally:
        session_cleared.disconnect(namespace["tell_auditors"])
    assert caplog.messages == [f"s: 1 items of user {user.pk}"]
    assert list(session_cleared.receivers) == before


@pytest.mark.django_db(transaction=True)
async def test_the_last_agent_goes_on() -> None:
    """The example of docs/usage.md."""
    from agents import Agent
    from agents.testing import function_call

    billing, _ = scripted([say("First"), say("Second")], name="Billing")
    handoff = [function_call("transfer_to_billing", {}, call_id="call_1")]
    triage: Agent[Any]
    triage, _ = scripted([handoff], name="Triage", handoffs=[billing])
    session = DjangoSession("user_123")
    [code] = [b for b in blocks(page("docs/usage.md"), "python") if "find_agent" in b]
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    names: dict[str, Any] = {"user": None, "session": session, "triage_agent": triage}
    exec("from agent_sessions import SessionHooks\nfrom agents import Runner\n", names)
    exec(f"async def go_on():\n{lines}    return agent, result\n", names)
    first, _ = await names["go_on"]()
    second, result = await names["go_on"]()
    assert (first.name, second.name) == ("Triage", "Billing")
    assert result.final_output == "Second"
    assert find_agent(triage, "nobody") is triage


@pytest.mark.django_db(transaction=True)
async def test_a_session_is_given_its_time() -> None:
    """The example of docs/sessions.md."""
    text = page("docs/sessions.md")
    [code] = [b for b in blocks(text, "python") if "expires_at" in b]
    await DjangoSession("user_123").add_items([{"role": "user", "content": "Hi"}])
    names: dict[str, Any] = {"user": None}
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    exec(f"async def set_time():\n{lines}", names)
    await names["set_time"]()
    row = await AgentSession.objects.aget()
    assert row.expires_at is not None
    assert row.expires_at - row.created_at > timedelta(days=29)
