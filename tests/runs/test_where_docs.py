"""The examples of docs/where-runs-work.md."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.utils.module_loading import import_string

from agent_sessions.models import AgentRun
from tests.runs.test_tasks import IMMEDIATE
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.documents import files, page

pytestmark = pytest.mark.django_db(transaction=True)

FILES = files(page("docs/where-runs-work.md"))


@pytest.fixture
def mysite(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the modules of the page."""
    modules = {}
    for name in ("agents", "routing", "consumers"):
        module = modules[name] = ModuleType(f"mysite.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(FILES[f"mysite/{name}.py"], module.__dict__)
    for name in ("support", "premium"):
        model = ScriptedModel([[assistant_message("Good day")]])
        getattr(modules["agents"], name).model = model
    return modules


async def test_the_consumer_with_a_function(mysite: Any, settings: Any) -> None:
    settings.TASKS = {"default": {"BACKEND": IMMEDIATE}}
    user = await sync_to_async(make_user)()
    user.is_staff = True
    await user.asave()
    row = await sync_to_async(create_conversation)(user)
    consumer = mysite["consumers"].SupportConsumer
    options = {"agent": consumer.agent, "task_options": {}, "consumer": consumer}
    async with Socket(row.session_id, user, **options) as socket:
        await socket.say("r-1", "Hello")
        assert text_of(await socket.to_end()) == "Good day"
    assert (await AgentRun.objects.aget()).agent_name == "Premium support"


def test_the_route_and_the_settings(mysite: Any) -> None:
    assert mysite["routing"].chat.callback
    names: dict[str, Any] = {"INSTALLED_APPS": []}
    exec(FILES["mysite/settings.py"], names)
    assert import_string(names["TASKS"]["default"]["BACKEND"])
    import_module(names["INSTALLED_APPS"][0])
