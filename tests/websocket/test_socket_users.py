"""Whose socket it is: the user of a middleware, of the session, of our own pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.auth import AuthMiddlewareStack
from channels.sessions import SessionMiddlewareStack
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser, Group, UserManager
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.test import RequestFactory

from agent_sessions import get_session
from agent_sessions.exceptions import InvalidOwner
from agent_sessions.views import SessionListView
from tests.support.chat import Socket, text_of
from tests.websocket.test_consumer import conversation, speaker
from tests.websocket.test_sockets import (
    Revoke,
    browser,
    change_password,
    delete_user,
    disable,
    log_out,
    seen_user,
)

pytestmark = pytest.mark.django_db(transaction=True)


class Token:
    """A middleware that says who the user is, whatever the cookie says."""

    def __init__(self, inner: Any, user: Any) -> None:
        self.inner = inner
        self.user = user

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        return await self.inner({**scope, "user": self.user}, receive, send)


def token(user: Any) -> Callable[[Any], Any]:
    def around(inner: Any) -> Any:
        return AuthMiddlewareStack(Token(inner, user))

    return around


async def test_the_user_of_a_middleware_wins_over_the_cookie() -> None:
    cookie, (user, session_id) = await browser(), await conversation()
    # The cookie's own conversation does not exist for the other user.
    async with cookie.tab(speaker(), around=token(user)) as tab:
        assert await tab.closed() == 4404
    cookie.session_id = session_id
    async with cookie.tab(speaker("yes"), around=token(user)) as tab:
        await tab.say("r-1", "Hi")
        assert text_of(await tab.to_end()) == "yes"
        # It is not the cookie's socket, so the cookie's log-out is not its business.
        await sync_to_async(log_out)(cookie)
        await seen_user(tab)
        await get_user_model().objects.filter(pk=user.pk).aupdate(is_active=False)
        await tab.sync()
        assert await tab.closed() == 4401


async def test_nobody_of_a_middleware_wins_over_the_cookie() -> None:
    cookie = await browser()
    async with cookie.tab(speaker(), around=token(AnonymousUser())) as tab:
        assert await tab.closed() == 4401
    async with cookie.tab(speaker(), around=token(None)) as tab:
        assert await tab.closed() == 4401


async def test_the_cookies_user_given_by_a_middleware_too_needs_the_session() -> None:
    cookie = await browser()
    async with cookie.tab(speaker(), around=token(cookie.user)) as tab:
        await seen_user(tab)
        await sync_to_async(log_out)(cookie)
        await tab.sync()
        assert await tab.closed() == 4401


async def test_a_session_alone_names_its_user() -> None:
    cookie = await browser()
    async with cookie.tab(speaker(), around=SessionMiddlewareStack) as tab:
        await seen_user(tab)
        await sync_to_async(log_out)(cookie)
        await tab.sync()
        assert await tab.closed() == 4401


@pytest.mark.parametrize("revoke", [change_password, disable, delete_user])
async def test_a_user_without_a_session_is_read_again(revoke: Revoke) -> None:
    there = await browser()
    async with Socket(there.session_id, there.user, speaker()) as tab:
        await seen_user(tab)
        await sync_to_async(revoke)(there)
        await tab.sync()
        assert await tab.closed() == 4401


async def test_a_row_of_another_model_is_nobody() -> None:
    """Its key is one of users too, of whom it knows nothing."""
    user, session_id = await conversation()
    robot: Any = Group(pk=user.pk, name="robot")
    robot.is_authenticated = robot.is_active = True
    async with Socket(session_id, robot, speaker()) as tab:
        assert await tab.closed() == 4401
    request: Any = RequestFactory().get("/")
    request.user = robot
    response = await sync_to_async(SessionListView.as_view())(request)
    assert response.status_code == 401
    with pytest.raises(InvalidOwner, match=r"auth\.Group is not the user model"):
        get_session(session_id, user=robot)


async def test_a_user_whom_the_default_manager_hides_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for Django's authentication: soft-deleted users can't log in either."""

    class Undeleted(UserManager[Any]):
        def get_queryset(self) -> Any:
            return super().get_queryset().exclude(last_name="deleted")

    user, session_id = await conversation()
    model: Any = get_user_model()
    manager = Undeleted()
    manager.model = model
    monkeypatch.setattr(model._meta, "default_manager", manager)
    async with Socket(session_id, user, speaker()) as tab:
        await seen_user(tab)
        await model.objects.filter(pk=user.pk).aupdate(last_name="deleted")
        await tab.sync()
        assert await tab.closed() == 4401


async def test_a_session_of_an_older_secret_key_is_left_as_it_is(
    settings: Any,
) -> None:
    """Django would give it a key of which the browser hears nothing over a socket."""
    there = await browser()
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
    settings.SECRET_KEY = "a new one"
    store = SessionStore(there.client.cookies["sessionid"].value)
    async with Socket(there.session_id, None, speaker(), scope={"session": store}) as t:
        await seen_user(t)
    assert await Session.objects.filter(pk=store.session_key).aexists()


async def test_a_session_of_a_backend_that_is_no_more_names_nobody(
    settings: Any,
) -> None:
    there = await browser()
    async with there.tab(speaker()) as tab:
        await seen_user(tab)
        settings.AUTHENTICATION_BACKENDS = [
            "django.contrib.auth.backends.AllowAllUsersModelBackend"
        ]
        await tab.sync()
        assert await tab.closed() == 4401


@pytest.mark.parametrize(
    "origins",
    [
        [b"null"],
        [b""],
        [b"http://["],
        [b"https://chat.example.com:port"],
        [b"https://chat.example.com.evil.org"],
        [b"https://chat.example.com@evil.org"],
        [b"\xff\xfe"],
        [b"https://chat.example.com", b"https://evil.org"],
        [b"https://evil.org", b"https://chat.example.com"],
    ],
)
async def test_an_origin_that_is_not_ours_alone_is_refused(
    settings: Any, origins: list[bytes]
) -> None:
    settings.ALLOWED_HOSTS = ["https://chat.example.com", ".example.net"]
    user, session_id = await conversation()
    headers = [(b"origin", origin) for origin in origins]
    tab = Socket(session_id, user, speaker(), headers=headers)
    connected, _ = await tab.communicator.connect()
    assert not connected
    await tab.communicator.disconnect()
