"""The run's context at the session: an owned one refuses what names someone else."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from agents import RunContextWrapper, Runner
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user, get_user_model, login
from django.contrib.auth.models import AnonymousUser, Group
from django.contrib.sessions.backends.db import SessionStore
from django.db import connection
from django.test import RequestFactory
from django.test.utils import CaptureQueriesContext
from django.utils.functional import SimpleLazyObject

from agent_sessions import DjangoSession
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.memory.base import names_other
from agent_sessions.testing.base import RUNS, Run
from tests.support.chat import make_user
from tests.support.usages import agent, say

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]

Make = Callable[[Any], Any]


@dataclass
class Context:
    """What an application gives to its tools."""

    user: Any = None
    user_id: Any = None
    request: Any = None


def request_of(user: Any) -> Any:
    request: Any = RequestFactory().get("/")
    request.user = user
    return request


NAMING: dict[str, Make] = {
    "an object's user": lambda user: Context(user=user),
    "an object's user_id": lambda user: Context(user_id=user.pk),
    "a mapping's user": lambda user: {"user": user},
    "a mapping's user_id": lambda user: {"user_id": user.pk},
    "a mapping of another kind": lambda user: UserDict(user=user),
    "a user_id as text": lambda user: {"user_id": str(user.pk)},
    "a request": request_of,
    "a member that is a request": lambda user: Context(request=request_of(user)),
    "a mapping's request": lambda user: {"request": request_of(user)},
    "a lazy user": lambda user: Context(user=SimpleLazyObject(lambda: user)),
    "the user itself": lambda user: user,
    "a socket's scope": lambda user: {"type": "websocket", "user": user},
    "a consumer": lambda user: SimpleNamespace(scope={"user": user}),
}

SILENT: dict[str, Any] = {
    "None": None,
    "an empty mapping": {},
    "a text": "whatever",
    "an object without one": Context(),
    "a user that is no user": Context(user="bob"),
    "a user as a mapping": {"user": {"name": "bob"}},
}

METHODS: dict[str, Any] = {
    "get_items": lambda session, wrapper: session.get_items(wrapper=wrapper),
    "get_items of a branch": lambda session, wrapper: session.get_items(
        branch_id="main", wrapper=wrapper
    ),
    "add_items": lambda session, wrapper: session.add_items(
        [{"role": "user", "content": "more"}], wrapper=wrapper
    ),
    "pop_item": lambda session, wrapper: session.pop_item(wrapper=wrapper),
    "clear_session": lambda session, wrapper: session.clear_session(wrapper=wrapper),
}

each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
each_naming = pytest.mark.parametrize("make", NAMING.values(), ids=NAMING)


async def users() -> tuple[Any, Any]:
    make = sync_to_async(make_user)
    return await make(), await make()


@each_naming
@each_run
async def test_a_run_for_the_owner_goes_on(make: Make, run: Run) -> None:
    owner, _ = await users()
    session = DjangoSession("s", user=owner)
    await run(agent(say("ok")), "Hi", session=session, context=make(owner))
    assert len(await session.get_items()) == 2


@each_naming
@each_run
async def test_a_run_for_someone_else_is_refused(make: Make, run: Run) -> None:
    owner, other = await users()
    session = DjangoSession("s", user=owner)
    speaker = agent(say("never"))
    with pytest.raises(SessionDoesNotExist):
        await run(speaker, "Hi", session=session, context=make(other))
    assert not speaker.model.calls  # type: ignore[union-attr]
    assert await session.get_items() == []


@pytest.mark.parametrize("context", SILENT.values(), ids=SILENT)
async def test_a_context_that_names_nobody_passes(context: Any) -> None:
    owner, _ = await users()
    session = DjangoSession("s", user=owner)
    await Runner.run(agent(say("ok")), "Hi", session=session, context=context)
    assert len(await session.get_items()) == 2


async def test_an_anonymous_user_is_someone_else() -> None:
    owner, _ = await users()
    session = DjangoSession("s", user=owner)
    anonymous = AnonymousUser()
    for context in (Context(user=anonymous), request_of(anonymous), anonymous):
        with pytest.raises(SessionDoesNotExist):
            await Runner.run(agent(say("no")), "Hi", session=session, context=context)


async def test_every_name_must_be_the_owners() -> None:
    owner, other = await users()
    session = DjangoSession("s", user=owner)
    for context in (
        Context(user=owner, user_id=other.pk),
        Context(user=other, user_id=owner.pk),
        Context(user=owner, request=request_of(other)),
        {"user_id": "not a key"},
        {"user_id": float(owner.pk)},
        {"user_id": owner.pk == owner.pk},
        {"user_id": float("inf")},
    ):
        with pytest.raises(SessionDoesNotExist):
            await Runner.run(agent(say("no")), "Hi", session=session, context=context)


async def test_a_session_without_an_owner_takes_every_context() -> None:
    """What several people share can't belong to the one who speaks."""
    owner, other = await users()
    session = DjangoSession("room")
    for person in (owner, other):
        await Runner.run(
            agent(say("ok")), "Hi", session=session, context=Context(user=person)
        )
    assert len(await session.get_items()) == 4


@pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
def test_each_method_refuses_before_any_query(call: Any) -> None:
    owner, other = make_user(), make_user()
    session = DjangoSession("s", user=owner)
    session.sync.add_items([{"role": "user", "content": "Hi"}])

    async def go(user: Any) -> None:
        await call(session, RunContextWrapper(Context(user=user)))

    with CaptureQueriesContext(connection) as queries:
        with pytest.raises(SessionDoesNotExist):
            async_to_sync(go)(other)
        assert len(queries) == 0
        async_to_sync(go)(owner)
        assert len(queries) > 0


async def test_a_requests_user_that_is_not_loaded_yet_is_loaded() -> None:
    owner, other = await users()

    def signed_in(user: Any) -> Any:
        request: Any = RequestFactory().get("/")
        request.session = SessionStore()
        login(request, user, backend="django.contrib.auth.backends.ModelBackend")
        request.user = SimpleLazyObject(lambda: get_user(request))
        return request

    session = DjangoSession("s", user=owner)
    context = await sync_to_async(signed_in)(owner)
    await Runner.run(agent(say("ok")), "Hi", session=session, context=context)
    context = await sync_to_async(signed_in)(other)
    with pytest.raises(SessionDoesNotExist):
        await Runner.run(agent(say("no")), "Hi", session=session, context=context)


def test_keys_are_compared_as_the_user_model_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from django.db.models import UUIDField

    key = UUID("0b1e4f6a-7c1d-4c58-9c51-3e1a5f0d7a10")
    model = SimpleNamespace(_meta=SimpleNamespace(pk=UUIDField()))
    monkeypatch.setattr("agent_sessions.memory.base.get_user_model", lambda: model)
    for text in (str(key), key.hex, str(key).upper()):
        assert not names_other({"user_id": text}, key)
    assert names_other({"user_id": "7"}, key)


def test_a_row_of_another_model_is_not_the_owner() -> None:
    other: Any = Group(pk=7, name="robot")
    for context in ({"user": other}, SimpleNamespace(scope={"user": other})):
        assert names_other(context, 7)
    other.is_authenticated = True
    assert names_other(other, 7)
    assert not names_other({"user": get_user_model()(pk=7)}, 7)
