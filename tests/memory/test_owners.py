"""Who may own a session, and what is said where somebody can't."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser, Group, User
from django.core.exceptions import SynchronousOnlyOperation
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, Client
from django.urls import path
from django.utils.functional import SimpleLazyObject

from agent_sessions import DjangoSession, get_session
from agent_sessions.exceptions import AgentSessionError, BlockingCall, InvalidOwner
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.retention.erasure import Receipt, erase_user

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]


def make_user(name: str = "alice") -> User:
    return get_user_model().objects.create_user(name)


NOBODY = [
    ("a name", "a value of type str is no user"),
    (7, "a value of type int is no user"),
    (User, "the class User is no user"),
    (object(), "a value of type object is no user"),
    (SimpleNamespace(pk=1), "a value of type SimpleNamespace is no user"),
    (Group(pk=1), "auth.Group is not the user model, auth.User"),
    (AgentSession(pk=1), "agent_sessions.AgentSession is not the user model"),
    (User(), "it is anonymous or not saved"),
    (User(pk=7), "it is anonymous or not saved"),
    (AnonymousUser(), "it is anonymous or not saved"),
    (SimpleLazyObject(AnonymousUser), "it is anonymous or not saved"),
    (
        SimpleNamespace(pk="seven", is_authenticated=True),
        "its key is none of the user model",
    ),
]


@pytest.mark.parametrize(("user", "reason"), NOBODY)
@pytest.mark.parametrize("open_session", [get_session, DjangoSession])
def test_only_a_saved_user_owns_a_session(
    open_session: Any, user: Any, reason: str
) -> None:
    with pytest.raises(InvalidOwner) as caught:
        open_session("room", user=user)
    assert reason in str(caught.value)
    assert "Give a saved user, or user=None" in str(caught.value)
    assert isinstance(caught.value, AgentSessionError)


@pytest.mark.parametrize("user", ["a name", 7, User, Group(pk=1)])
@pytest.mark.parametrize("model", [AgentSession, AgentRun])
def test_query_sets_refuse_what_is_no_user(model: Any, user: Any) -> None:
    with pytest.raises(InvalidOwner):
        model.objects.for_user(user)


def test_query_sets_find_nothing_for_an_anonymous_user() -> None:
    get_session("room").sync.add_items([{"role": "user", "content": "Hi"}])
    assert not AgentSession.objects.for_user(AnonymousUser()).exists()  # type: ignore[arg-type]
    assert AgentSession.objects.for_user(None).exists()


def test_erasing_refuses_what_is_no_user() -> None:
    receipt = Receipt("a name", "1", "")
    with pytest.raises(InvalidOwner):
        erase_user("a name", receipt, batch_size=10)  # type: ignore[arg-type]


def test_users_of_other_kinds_own_what_their_row_does() -> None:
    alice = make_user()
    of_token = SimpleNamespace(pk=str(alice.pk), is_authenticated=True)
    users: list[Any] = [
        alice,
        SimpleLazyObject(lambda: alice),
        of_token,
        User.objects.only("pk").get(pk=alice.pk),
    ]
    for user in users:
        assert get_session("room", user=user).key.user_id == alice.pk


# -- requests ---------------------------------------------------------------------


def _greet(user: Any) -> Any:
    return get_session("user_123", user=user)


async def _of_request(request: HttpRequest) -> HttpResponse:
    session = _greet(request.user)
    return HttpResponse(str(len(await session.get_items())))


async def _of_auser(request: HttpRequest) -> HttpResponse:
    session = _greet(await request.auser())
    await session.add_items([{"role": "user", "content": "Hi"}])
    return HttpResponse(str(len(await session.get_items())))


def _listed(request: HttpRequest) -> HttpResponse:
    count = AgentSession.objects.for_user(request.user).count()  # type: ignore[arg-type]
    return HttpResponse(str(count))


urlpatterns = [
    path("lazy/", _of_request),
    path("loaded/", _of_auser),
    path("listed/", _listed),
]


@pytest.mark.urls("tests.memory.test_owners")
def test_an_async_view_is_told_to_await_the_user() -> None:
    client = Client()
    client.force_login(make_user())
    with pytest.raises(InvalidOwner, match=r"await request\.auser\(\)") as caught:
        client.get("/lazy/")
    # Who has caught Django's own error so far still does.
    assert isinstance(caught.value, SynchronousOnlyOperation)
    assert client.get("/loaded/").content == b"1"
    assert client.get("/listed/").content == b"1"


def test_a_query_set_in_async_code_is_told_to_await_the_user() -> None:
    alice = make_user()
    request = AsyncRequestFactory().get("/")
    request.user = SimpleLazyObject(lambda: User.objects.get(pk=alice.pk))  # type: ignore[assignment]

    async def view() -> None:
        AgentSession.objects.for_user(request.user)  # type: ignore[arg-type]

    with pytest.raises(InvalidOwner, match=r"await request\.auser\(\)"):
        async_to_sync(view)()
    assert request.user.pk == alice.pk
    assert get_session("room", user=request.user).key.user_id == alice.pk


def test_the_sync_face_names_what_to_await() -> None:
    session = DjangoSession("room")
    calls = {
        "get_items": (),
        "add_items": ([{"role": "user", "content": "Hi"}],),
        "pop_item": (),
        "clear_session": (),
        "list_branches": (),
        "get_session_usage": (),
    }

    async def call(name: str) -> None:
        getattr(session.sync, name)(*calls[name])

    for name in calls:
        with pytest.raises(BlockingCall, match=rf"await session\.{name}\(\)"):
            async_to_sync(call)(name)
    assert session.sync.get_items() == []
